"""Small trainings that say what each stage and setting is worth; their results: `docs/experiments.md`."""
