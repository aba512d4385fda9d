"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, shape: str) -> float:
    """Factor of the peak learning rate for optimizer step `step` (0-based).

    Linear warm-up over `warmup_ratio` of all steps (the first step already moves), then `shape`:
    "linear" to 0, "cosine" to 0, or "constant".

    >>> [learning_rate_factor(s, 10, 0.2, "linear") for s in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if shape == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
