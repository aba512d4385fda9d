"""Query-passage scores of the three heads, local and over all ranks."""
