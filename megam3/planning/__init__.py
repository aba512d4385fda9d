"""What a run will need before it starts: memory of one rank, counted from sizes alone."""
