"""The unified loss without score matrices: tiles of queries × passages and running sums."""
