"""The fastest memory strategy that fits: templates, ways to save activations and chunk sizes, by arithmetic.

Costs are in forward-units, the time of one forward pass over the step's tokens at the device's assumed rate:

    forward and backward pass                            3
    gradient cache: a first pass without a graph        +1
    checkpointing: the layers run again                 +1
    exposed communication: bytes a rank sends (planning/communication.py) by the link's rate, and for offload
    the layer inputs to host memory and back by the host link's rate; a share of each, since most of it runs
    beside compute
    every chunk's gradient, which is added to those before it: bytes by the GPU memory's rate

ZeRO-3 with checkpointing, offload and chunks costs 5 and a little; 3 is the least there is. The rates
are assumptions (see `Hardware`): they order settings whose compute is equal, no one should read seconds
from them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megam3.config.deepspeed import FP32_SUMS_FROM_STAGE
from megam3.encoders import EncoderShape
from megam3.planning.communication import step_volume
from megam3.planning.memory import plan_memory
from megam3.planning.parameters import num_parameters, num_trained
from megam3.planning.shapes import ModelShape, StepShape, Strategy

FORWARD_AND_BACKWARD, FIRST_PASS, RECOMPUTED = 3, 1, 1
"""Forward-units: a backward pass is two forward passes (gradients of inputs and of weights)."""


GRADIENT_SUM_BYTES = 10
"""A parameter and backward pass: its gradient in bf16 read, the fp32 sum read and written."""
HOST_ADAMW_BYTES = 28
"""A parameter: gradient, master and two moments read, master and moments written, in fp32."""


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
    memory_bytes_per_second: float = 2.5e12
    """Of the GPU's own memory, an H100's 3.35e12 less what copies do not reach."""
    host_memory_bytes_per_second: float = 2e10
    """A rank's share of a node's memory bandwidth, for AdamW on the host."""
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
        once = " engine.gradient_reduction=once" if self.strategy.reduces_once else ""
        return (
            f"engine.template={self.template}"
            f" engine.activation_checkpointing={str(self.strategy.checkpointing).lower()}"
            f" engine.activation_offload={str(self.strategy.activation_offload).lower()}"
            f" data.batch.chunk_tokens={chunk}{once}"
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
    shape = EncoderShape(
        num_layers=model.num_layers + model.has_decoder,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        query_width=model.queries,
        key_width=model.keys,
        is_gated=model.layer != "post_norm",
        is_causal=model.is_causal,
        num_windowed_layers=model.num_windowed_layers,
        window_reach=model.window_reach,
    )
    flops = step.num_passages * shape.forward_flops([step.passage_tokens])
    if step.num_queries:
        flops += step.num_queries * shape.forward_flops([step.query_tokens])
    predictions = int(step.num_tokens * model.predictions_per_token)
    return flops + 2 * model.hidden_size * model.vocab_size * predictions


def num_chunks(step: StepShape, chunk_tokens: int | None) -> int:
    """Backward passes of a step: 1 without a gradient cache, and where one chunk holds everything."""
    if chunk_tokens is None:
        return 1
    return max(1, -(-step.num_tokens // max(chunk_tokens, step.longest_tokens)))


def sums_precisely(strategy: Strategy, chunks: int) -> bool:
    """Whether gradients of all chunks are summed in fp32; DeepSpeed does so from stage 2 on."""
    return chunks == 1 or strategy.precision_bytes == 4 or strategy.zero_stage >= FP32_SUMS_FROM_STAGE


def settings(
    templates: dict[str, Strategy], steps: Sequence[StepShape], chunk_tokens: int | None = None
) -> Iterator[Setting]:
    """Every combination: template × (nothing, checkpointing, offload too) × (one pass, then chunk sizes), and
    at stage 2 with several chunks × (a reduction a chunk, one a step).

    `chunk_tokens` given: no other chunk size is tried. `templates` maps engine.template to its strategy.
    Chunks are the longest text times a power of two, the
    largest first that does not hold the largest step whole.
    """
    longest, most = max(step.longest_tokens for step in steps), max(step.num_tokens for step in steps)
    chunks: list[int | None] = [longest]
    while chunks[0] is not None and chunks[0] * 2 < most:
        chunks.insert(0, chunks[0] * 2)
    sizes = [None, *chunks] if chunk_tokens is None else [chunk_tokens]
    for template, base in templates.items():
        for checkpointing, offload in ((False, False), (True, False), (True, True)):
            strategy = replace(base, checkpointing=checkpointing, activation_offload=offload)
            for size in sizes:
                yield Setting(template=template, strategy=strategy, chunk_tokens=size)
                if strategy.zero_stage == 2 and strategy.world_size > 1 and size is not None and size < most:
                    once = replace(strategy, reduces_once=True)
                    yield Setting(template=template, strategy=once, chunk_tokens=size)


def predict(
    model: ModelShape, setting: Setting, steps: Sequence[StepShape], hardware: Hardware | None = None
) -> Candidate:
    """Cost of the step with most tokens, and the largest peak of all `steps` (one for each length bucket)."""
    rates = hardware or Hardware()
    strategy, heaviest = setting.strategy, max(steps, key=lambda step: step.num_tokens)
    chunks = num_chunks(heaviest, setting.chunk_tokens)
    # a loss over single tokens needs no representations of the whole batch first
    has_first_pass = chunks > 1 and not model.predictions_per_token
    seconds = _exposed_seconds(model, strategy, heaviest, chunks, has_first_pass, rates)
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
        compute_units=FORWARD_AND_BACKWARD
        + FIRST_PASS * has_first_pass
        + RECOMPUTED * strategy.checkpointing,
        exposed_units=seconds * rates.flops_per_second / forward_flops(model, heaviest),
        peak_bytes=max(peaks),
    )


def _exposed_seconds(
    model: ModelShape,
    strategy: Strategy,
    step: StepShape,
    chunks: int,
    has_first_pass: bool,
    rates: Hardware,
) -> float:
    """Communication and copies of a step that compute does not hide; see the top of this file."""
    trained = num_trained(model)
    volume = step_volume(
        zero_stage=strategy.zero_stage,
        world_size=strategy.world_size,
        num_parameters=num_parameters(model),
        num_trained=trained,
        num_chunks=chunks,
        precision_bytes=strategy.precision_bytes,
        reduces_once=strategy.reduces_once,
        has_first_pass=has_first_pass,
    )
    is_local = strategy.world_size <= rates.ranks_per_node
    link = rates.local_bytes_per_second if is_local else rates.remote_bytes_per_second
    seconds = volume.total_bytes / link
    if strategy.activation_offload:
        inputs = model.num_layers * step.num_tokens * model.hidden_size * strategy.precision_bytes
        seconds += 2 * inputs / rates.host_bytes_per_second
    if strategy.parameter_offload:
        seconds += volume.weight_bytes / rates.host_bytes_per_second
    seconds *= rates.exposed_share
    if chunks > 1:
        # why larger chunks are faster: 2 ms of 50 for bge-m3's size and chunks of 8192 tokens
        seconds += chunks * trained * GRADIENT_SUM_BYTES / rates.memory_bytes_per_second
    if strategy.optimizer_offload:
        # the step waits for AdamW on the host, which reads and writes its state once
        share = -(-trained // strategy.world_size)
        seconds += share * HOST_ADAMW_BYTES / rates.host_memory_bytes_per_second
    return seconds


def fitting(
    model: ModelShape,
    templates: dict[str, Strategy],
    steps: Sequence[StepShape],
    limit_bytes: int,
    hardware: Hardware | None = None,
) -> list[Candidate]:
    """Settings whose peak stays within `limit_bytes`, the fastest first; of equal ones the least memory."""
    every = candidates(model, templates, steps, hardware=hardware)
    return [candidate for candidate in every if candidate.peak_bytes <= limit_bytes]


def candidates(
    model: ModelShape,
    templates: dict[str, Strategy],
    steps: Sequence[StepShape],
    *,
    chunk_tokens: int | None = None,
    hardware: Hardware | None = None,
) -> list[Candidate]:
    """Every setting with its prediction, the fastest first, whatever its memory; `chunk_tokens` as in
    `settings`.

    Settings that would sum gradients of several chunks in bf16 are left out: faster, but less exact training.
    """
    heaviest = max(steps, key=lambda step: step.num_tokens)
    found = [
        predict(model, setting, steps, hardware)
        for setting in settings(templates, steps, chunk_tokens)
        if sums_precisely(setting.strategy, num_chunks(heaviest, setting.chunk_tokens))
    ]
    return sorted(found, key=lambda candidate: (candidate.cost, candidate.peak_bytes))
