"""What is measured, one process each. Files named after a peer run in that peer's environment and import
nothing of megam3."""
