"""megam3: train multilingual retrieval encoders with dense, lexical and multi-vector heads, from one CPU to
many GPUs."""

__version__ = "0.1.0"
