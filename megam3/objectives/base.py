"""The one seam between the trainer and a training stage.

The trainer knows no stage: it hands an objective the engine, one batch and the progress, and gets named
numbers back. A new
stage is one file beside this one: a subclass of Objective, and the section of the recipe it reads
(docs/architecture.md shows one in full).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megam3.batch import Progress, Representations
from megam3.config.objective import ObjectiveConfig
from megam3.config.schema import ModelConfig
from megam3.encoders import EncoderShape
from megam3.packed_texts import PackedTexts

Section = TypeVar("Section", bound=ObjectiveConfig)


class Trainee(Protocol):
    """What an objective needs of the engine."""

    def forward(self, *args: Any) -> Any:
        """Call the model; under ZeRO-3 every call has to come this way. The graph is kept unless gradients
        are off."""
        ...

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients of `loss`; `is_last` marks the last call of this batch on this rank."""
        ...


class Objective(ABC, Generic[Section]):
    """One training stage; holds settings only, so that a step depends on nothing but its arguments.

    Args:
        section: the recipe's `objective`.
        chunk_tokens: token budget of a forward pass (data.batch.chunk_tokens); None: one pass for the whole
            batch of a rank.
    """

    section_type: ClassVar[type[ObjectiveConfig]]
    """The section this objective reads; `kind` of the recipe selects both."""

    def __init__(self, section: Section, chunk_tokens: int | None = None):
        self.section = section
        self.chunk_tokens = chunk_tokens

    @abstractmethod
    def load_model(self, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
        """The model this stage trains, from the folder `config.path`.

        Raises:
            ConfigError, CheckpointError: the folder cannot be used.
        """

    def prepare(self, batches: Sequence[Any], progress: Progress) -> Sequence[Any]:
        """What `run` receives for each batch of an optimizer step; collective, before the first pass.

        Stages whose loss divides by a count over the whole step take that count here. By default `run`
        receives the batches themselves, and a step is the mean over them.

        Args:
            batches: this rank's share of every accumulated batch, on the device.
        """
        return batches

    @abstractmethod
    def run(self, engine: Trainee, batch: Any, progress: Progress) -> dict[str, Tensor]:
        """Forward and backward passes for one batch of this rank.

        Returns detached scalars by name: this rank's share of each figure, so that their mean over ranks is
            the figure of the global batch. The names are the same in every step and on every rank.
        """

    @abstractmethod
    def shape(self, model: nn.Module) -> EncoderShape:
        """The sizes that decide the arithmetic of `model`, for the share of peak in the log."""

    def is_head_parameter(self, name: str) -> bool:
        """Whether the parameter of this name trains at optim.head_lr instead of optim.lr."""
        return False

    def represent(self, forward: Callable[..., Any], texts: PackedTexts) -> Representations:
        """What the model in training says of texts, for evaluation; only where the section's `can_evaluate`
        is true."""
        raise AssertionError(
            f"{type(self).__name__} ranks no passages; the section's can_evaluate says otherwise"
        )

    def warnings(self, figures: Mapping[str, float], dead_head_share: float) -> Iterator[str]:
        """What the logged figures say of the model's health, in words a user can act on.

        Args:
            dead_head_share: train.dead_head_share.
        """
        yield from ()


def find_objective(section: ObjectiveConfig) -> type[Objective]:
    """The objective that reads `section`, among all subclasses of Objective that have been imported."""
    waiting = list(Objective.__subclasses__())
    while waiting:
        found = waiting.pop()
        if getattr(found, "section_type", None) is type(section):
            return found
        waiting += found.__subclasses__()
    raise AssertionError(
        f"no objective reads {type(section).__name__}: its file must be imported before the run is built"
    )
