"""Ranks: where they come from, how they talk, and differentiable gathers."""
