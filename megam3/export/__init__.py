"""Trained weights out, in the layouts other libraries read; one file per consumer."""
