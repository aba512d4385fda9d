"""Worked examples; they import megam3, and megam3 never imports them."""
