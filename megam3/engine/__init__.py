"""The optimizer step: schedule, parameter groups, activation memory, and the one file that talks to
DeepSpeed's engine."""
