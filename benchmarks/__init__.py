"""Side-by-side runs of megam3 against its peers and against plain torch: `python -m benchmarks`, or `python
-m benchmarks NAME…`."""
