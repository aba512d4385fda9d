"""The one protocol between the trainer and a training stage.

The trainer knows no stage: it hands an objective the engine, one batch and the progress, and gets named numbers back.
A new stage is one file beside this one.
"""

from typing import Any, Protocol

from torch import Tensor

from megam3.batch import PackedTexts, Progress, Representations


class Encoder(Protocol):
    """What an objective needs of the engine."""

    def encode(self, texts: PackedTexts) -> Representations:
        """Run the model; the graph is kept unless gradients are off."""
        ...

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients of `loss`; `is_last` marks the last call of this batch on this rank."""
        ...


class Objective(Protocol):
    """One training stage."""

    def run(self, engine: Encoder, batch: Any, progress: Progress) -> dict[str, Tensor]:
        """Forward and backward passes for one batch of this rank.

        Returns detached scalars by name: this rank's share of each figure, so that their mean over ranks is the figure of the global batch.
        """
        ...
