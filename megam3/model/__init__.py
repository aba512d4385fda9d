"""The encoder on packed texts, its three heads, and how their weights are read and written."""
