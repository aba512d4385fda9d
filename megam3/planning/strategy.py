"""The fastest memory strategy that fits: templates, ways to save activations and chunk sizes, by arithmetic.

Costs are in forward-units, the time of one forward pass over the step's tokens at the device's assumed rate:

    forward and backward pass                            3
    gradient cache: a first pass without a graph        +1
    checkpointing: the layers run again                 +1
    exposed communication: bytes a rank sends (planning/communication.py) by the link's rate, and for offload
    the layer inputs to host memory and back by the host link's rate; a share of each, since most of it runs
    beside compute

ZeRO-3 with checkpointing, offload and chunks costs 5 and a little; 3 is the least there is. The rates
are assumptions (see `Hardware`): they order settings whose compute is equal, no one should read seconds
from them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megam3.config.deepspeed import FP32_SUMS_FROM_STAGE
from megam3.planning.communication import step_volume
from megam3.planning.memory import ModelShape, StepShape, Strategy, plan_memory

FORWARD_AND_BACKWARD, FIRST_PASS, RECOMPUTED = 3, 1, 1
"""Forward-units: a backward pass is two forward passes (gradients of inputs and of weights)."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Assumed rates of one GPU, of the order of an H100 node's; none was measured here."""

    flops_per_second: float = 4e14
    """Matrix products in bf16, about 40 % of an H100's dense peak."""
    local_bytes_per_second: float = 3e11
    """To GPUs of the same node."""
    remote_bytes_per_second: float = 4e10
    """To other nodes: 400 Gbit/s a GPU, less its overhead."""
    host_bytes_per_second: float = 4e10
    """To pinned host memory, either way."""
    ranks_per_node: int = 8
    """GPUs that share the local link."""
    exposed_share: float = 0.2
    """Part of communication and copies that compute does not hide."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the enumeration."""

    template: str
    """engine.template"""
    strategy: Strategy
    """What the template and the engine section make of it."""
    chunk_tokens: int | None
    """data.batch.chunk_tokens"""

    def fields(self) -> str:
        """As recipe overrides."""
        chunk = "null" if self.chunk_tokens is None else self.chunk_tokens
        return (
            f"engine.template={self.template}"
            f" engine.activation_checkpointing={str(self.strategy.checkpointing).lower()}"
            f" engine.activation_offload={str(self.strategy.activation_offload).lower()}"
            f" data.batch.chunk_tokens={chunk}"
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A setting that can run, and what it is predicted to take."""

    setting: Setting
    compute_units: int
    """Passes over the tokens, in forward-units."""
    exposed_units: float
    """Communication and copies that compute does not hide, in forward-units."""
    peak_bytes: int
    """Planned peak of one rank over all steps it was asked for."""

    @property
    def cost(self) -> float:
        """Forward-units of a step."""
        return self.compute_units + self.exposed_units


def forward_flops(model: ModelShape, step: StepShape) -> int:
    """Of one pass of the layers over a step's texts: products of weights, and attention within each text."""
    hidden = model.hidden_size
    weights = 2 * (4 * hidden * hidden + 2 * hidden * model.intermediate_size)
    per_layer = step.num_tokens * weights
    for count, length in (
        (step.num_queries, step.query_tokens),
        (step.num_passages, step.passage_tokens),
    ):
        per_layer += count * length * length * 4 * hidden
    return model.num_layers * per_layer


def num_chunks(step: StepShape, chunk_tokens: int | None) -> int:
    """Backward passes of a step: 1 without a gradient cache, and where one chunk holds everything."""
    if chunk_tokens is None:
        return 1
    return max(1, -(-step.num_tokens // max(chunk_tokens, step.longest_tokens)))


def sums_precisely(strategy: Strategy, chunks: int) -> bool:
    """Whether gradients of all chunks are summed in fp32; DeepSpeed does so from stage 2 on."""
    return chunks == 1 or strategy.precision_bytes == 4 or strategy.zero_stage >= FP32_SUMS_FROM_STAGE


def settings(templates: dict[str, Strategy], steps: Sequence[StepShape]) -> Iterator[Setting]:
    """Every combination: template × (nothing, checkpointing, offload too) × (one pass, then chunk sizes).

    `templates` maps engine.template to its strategy. Chunks are the longest text times a power of two, the
    largest first that does not hold the largest step whole.
    """
    longest, most = max(step.longest_tokens for step in steps), max(step.num_tokens for step in steps)
    chunks: list[int | None] = [longest]
    while chunks[0] is not None and chunks[0] * 2 < most:
        chunks.insert(0, chunks[0] * 2)
    for template, base in templates.items():
        for checkpointing, offload in ((False, False), (True, False), (True, True)):
            strategy = replace(base, checkpointing=checkpointing, activation_offload=offload)
            for chunk_tokens in (None, *chunks):
                yield Setting(template=template, strategy=strategy, chunk_tokens=chunk_tokens)


def predict(
    model: ModelShape, setting: Setting, steps: Sequence[StepShape], hardware: Hardware | None = None
) -> Candidate:
    """Cost of the step with most tokens, and the largest peak of all `steps` (one for each length bucket)."""
    rates = hardware or Hardware()
    strategy, heaviest = setting.strategy, max(steps, key=lambda step: step.num_tokens)
    chunks = num_chunks(heaviest, setting.chunk_tokens)
    compute = FORWARD_AND_BACKWARD + FIRST_PASS * (chunks > 1) + RECOMPUTED * strategy.checkpointing
    volume = step_volume(
        zero_stage=strategy.zero_stage,
        world_size=strategy.world_size,
        num_parameters=model.num_parameters,
        num_chunks=chunks,
        precision_bytes=strategy.precision_bytes,
    )
    is_local = strategy.world_size <= rates.ranks_per_node
    seconds = volume.total_bytes / (
        rates.local_bytes_per_second if is_local else rates.remote_bytes_per_second
    )
    if strategy.activation_offload:
        inputs = model.num_layers * heaviest.num_tokens * model.hidden_size * strategy.precision_bytes
        seconds += 2 * inputs / rates.host_bytes_per_second
    forward_seconds = forward_flops(model, heaviest) / rates.flops_per_second
    # a step that one chunk holds runs as one pass: its loss and its activations are alive together
    peaks = [
        plan_memory(
            model,
            strategy,
            replace(
                step,
                chunk_tokens=None if num_chunks(step, setting.chunk_tokens) == 1 else setting.chunk_tokens,
            ),
        ).total_bytes
        for step in steps
    ]
    return Candidate(
        setting=setting,
        compute_units=compute,
        exposed_units=rates.exposed_share * seconds / forward_seconds,
        peak_bytes=max(peaks),
    )


def fitting(
    model: ModelShape,
    templates: dict[str, Strategy],
    steps: Sequence[StepShape],
    limit_bytes: int,
    hardware: Hardware | None = None,
) -> list[Candidate]:
    """Settings whose peak stays within `limit_bytes`, the fastest first; of equal ones the least memory.

    Settings that would sum gradients of several chunks in bf16 are left out: faster, but less exact training.
    """
    heaviest = max(steps, key=lambda step: step.num_tokens)
    candidates = [
        predict(model, setting, steps, hardware)
        for setting in settings(templates, steps)
        if sums_precisely(setting.strategy, num_chunks(heaviest, setting.chunk_tokens))
    ]
    within = [candidate for candidate in candidates if candidate.peak_bytes <= limit_bytes]
    return sorted(within, key=lambda candidate: (candidate.cost, candidate.peak_bytes))
