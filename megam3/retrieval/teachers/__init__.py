"""Models that score (query, passage) pairs for distillation, and the pass over files that writes their
scores."""
