"""Passages on disk, encoded once and searched without holding them: pool (texts), build (encode), layout
(read), search (rank)."""
