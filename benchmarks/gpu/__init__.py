"""`python -m benchmarks gpu`: the table of one GPU node, in pieces that each end within ten minutes."""
