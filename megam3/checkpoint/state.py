"""What a checkpoint says about itself: where the run stands, and what must agree before it continues."""

from __future__ import annotations

from dataclasses import dataclass, field

from megam3.batch import Progress


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run needs to know of a checkpoint before it touches the weights."""

    progress: Progress
    world_size: int
    zero_stage: int
    model_signature: str
    """Hash of every parameter's name and shape."""
    data_fingerprint: str
    """Hashes of tokenizer, data and plan; equal fingerprints serve equal batches."""
    layout: str = ""
    """What decides how weights and moments are cut into files: ranks, DeepSpeed's ZeRO section, precision."""
    skipped: list[list[int]] = field(default_factory=list)
    """Places of the plan, in steps, that the run goes round (`megam3.data.skips`)."""
    overflows: int = 0
    """Steps that loss scaling skipped since the run began (fp16)."""
    recipe: dict = field(default_factory=dict)
    """The resolved recipe that wrote it."""


def has_same_layout(saved: RunState, current: RunState) -> bool:
    """Whether each rank can read back the very files it would have written; otherwise states are joined and
    cut anew, by name.
    """
    return saved.layout == current.layout
