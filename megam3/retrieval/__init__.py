"""Evaluation as in the M3 paper: five retrieval modes and BM25 on folders in BEIR format."""
