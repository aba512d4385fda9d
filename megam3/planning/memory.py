"""How much memory one rank needs, by counting: model states per ZeRO stage, what autograd saves,
representations, loss. Pure arithmetic.

What a layer of the BERT family (norms after the residuals) keeps for its backward pass, for T tokens of width
H, inner width I, A heads:

    8·T·H         its input (read by query, key and value), query, key, value, attention output, both sums
                  before the norms, the first norm's output (read by the inner product)
    2·T·I         the inner product before and after GELU
    T·A           in fp32: log-sum-exp of attention per head
    +T·H          on a CPU, texts of several lengths: attention outputs per length and joined
    2·T·H         entries of dropout's two masks: one byte each on CUDA, a factor in full precision on a CPU
    +3·T·A·L      attention dropout leaves the kernel on a CPU: softmax, mask and product, longest text L

Checkpointed, a layer keeps its input alone, and one layer at a time has all of the above. Offloaded, that
input waits in host memory.
Beside the layers: the embeddings' sum before its norm, the last hidden states, and the multi-vector rows.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megam3.config.deepspeed import FP32_SUMS_FROM_STAGE
from megam3.loss.limits import GROUP_TILE_TEXTS, SCORE_MATRICES, loss_needs_tiles, texts_per_tile
from megam3.scoring.chunks import passages_at_a_time, products_at_a_time, rows_widened_at_a_time

FP32, INT32 = 4, 4

WINNER_BYTES = 28
"""MaxSim's backward pass per (query row, passage): column, coefficient, sorted column, order (int64), row and
value."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of an encoder with three heads."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    num_positions: int
    num_types: int = 1
    multi_vector_dim: int = 0
    """0: as wide as the encoder."""
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def row_width(self) -> int:
        """C."""
        return self.multi_vector_dim or self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights: embeddings, layers, two heads."""
        hidden, inner, width = self.hidden_size, self.intermediate_size, self.row_width
        embeddings = (self.vocab_size + self.num_positions + self.num_types + 2) * hidden
        layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden
        return embeddings + self.num_layers * layer + hidden + 1 + width * (hidden + 1)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the memory is shared and saved: what ds_configs/ and the engine section decide."""

    zero_stage: int = 0
    world_size: int = 1
    precision_bytes: int = 2
    """Bytes of a weight: 2 in bf16, 4 in fp32."""
    checkpointing: bool = False
    activation_offload: bool = False
    optimizer_offload: bool = False
    parameter_offload: bool = False
    bucket_elements: int = 0
    """Gradients reduced at a time; twice when communication overlaps. DeepSpeed allocates it whole."""
    live_parameters: int = 0
    """ZeRO-3: gathered parameters held at a time, at most."""
    on_gpu: bool = True


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The work of one rank in one step."""

    num_queries: int
    num_passages: int
    query_tokens: int
    """Tokens of a query."""
    passage_tokens: int
    """Tokens of a passage."""
    chunk_tokens: int | None = None
    """Gradient cache: tokens of a forward pass; None: all at once."""
    loss_tiles: Literal["auto", "always", "never"] = "auto"
    """Whether the loss works in tiles; auto: `loss_needs_tiles`."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return self.num_queries * self.query_tokens + self.num_passages * self.passage_tokens

    @property
    def longest_tokens(self) -> int:
        """A chunk is never smaller than one text."""
        return max(self.query_tokens, self.passage_tokens)

    @property
    def pass_tokens(self) -> int:
        """Tokens of the largest forward pass."""
        return (
            self.num_tokens
            if self.chunk_tokens is None
            else min(self.num_tokens, max(self.chunk_tokens, self.longest_tokens))
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank, by what holds them."""

    states: dict[str, int]
    """Held throughout: weights, gradients, optimizer, buffers."""
    step: dict[str, int]
    """Held at the worst moment of a step."""

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return sum(self.states.values()) + sum(self.step.values())


def state_bytes(model: ModelShape, strategy: Strategy) -> dict[str, int]:
    """Model states on the device of one rank (arXiv 1910.02054, section 3, and DeepSpeed's buffers).

    Per parameter: weight and gradient in the model's precision (from stage 2 on gradients are summed in
    fp32), fp32 master (every stage but 0 in fp32 keeps one), two fp32 moments, and an fp32 gradient while
    AdamW runs. Stage 1 shares the fp32 part, stage 2 gradients too, stage 3 everything.
    """
    stage, ranks, precision, count = (
        strategy.zero_stage,
        strategy.world_size,
        strategy.precision_bytes,
        model.num_parameters,
    )

    def share(first_stage: int) -> int:
        return -(-count // ranks) if stage >= first_stage else count

    has_master = stage > 0 or precision != FP32
    weights = 0 if strategy.parameter_offload else share(3) * precision
    states = {
        "weights": weights
        + (min(count, strategy.live_parameters or count) * precision if stage == 3 and ranks > 1 else 0),
        "gradients": share(2) * (FP32 if stage >= FP32_SUMS_FROM_STAGE else precision),
        "optimizer": 0
        if strategy.optimizer_offload
        else share(1) * ((2 * FP32 if has_master else 0) + 2 * FP32),
    }
    buckets = strategy.bucket_elements if strategy.on_gpu else min(strategy.bucket_elements, count)
    return {**states, "buckets": buckets * precision if stage > 0 else 0}


def layer_bytes(
    model: ModelShape, strategy: Strategy, num_tokens: int, longest_tokens: int, mixed_lengths: bool = True
) -> int:
    """What one layer saves for its backward pass, its input included; the table at the top of this file."""
    hidden, inner, heads, size = (
        model.hidden_size,
        model.intermediate_size,
        model.num_attention_heads,
        strategy.precision_bytes,
    )
    entries = 8 * hidden + 2 * inner + (hidden if mixed_lengths and not strategy.on_gpu else 0)
    per_token = entries * size + 2 * 2 * FP32
    if model.hidden_dropout:
        per_token += 2 * hidden * (1 if strategy.on_gpu else size)
    if model.attention_dropout and not strategy.on_gpu:
        per_token += 3 * heads * longest_tokens * size
    else:
        per_token += heads * FP32
    return num_tokens * per_token


def saved_bytes(
    model: ModelShape, strategy: Strategy, num_tokens: int, longest_tokens: int, mixed_lengths: bool = True
) -> int:
    """What a forward pass over `num_tokens` leaves for the backward pass, and its multi-vector rows
    themselves."""
    size = strategy.precision_bytes
    unit, row = num_tokens * model.hidden_size * size, num_tokens * model.row_width * size
    mask = num_tokens * model.hidden_size * (1 if strategy.on_gpu else size) if model.hidden_dropout else 0
    kept = model.num_layers * layer_bytes(model, strategy, num_tokens, longest_tokens, mixed_lengths)
    if strategy.checkpointing:
        # offload keeps the newest input or two on the device, whatever the depth
        kept = unit * (
            min(2, model.num_layers) if strategy.activation_offload and strategy.on_gpu else model.num_layers
        )
    # the embeddings' sum; layers; last hidden states; rows before and after their normalisation
    return unit + mask + kept + unit + 2 * row


def activation_bytes(
    model: ModelShape, strategy: Strategy, num_tokens: int, longest_tokens: int, mixed_lengths: bool = True
) -> int:
    """Peak of one forward and backward pass over `num_tokens`, parameter gradients not included.

    The backward pass adds gradients to what the forward pass saved, and frees it layer by layer. Three
    moments compete: at the heads, five temporaries of the rows' size (their gradient, its quotient by the
    norm, three for the norm's own); in the last layer, recomputed when checkpointed, the gradients before and
    after the inner product, while last hidden states and one copy of the rows are gone; and the word
    embeddings' gradient, a whole matrix before it is added to what earlier chunks left.
    """
    size = strategy.precision_bytes
    unit, row = num_tokens * model.hidden_size * size, num_tokens * model.row_width * size
    saved = saved_bytes(model, strategy, num_tokens, longest_tokens, mixed_lengths)
    recomputed = (
        layer_bytes(model, strategy, num_tokens, longest_tokens, mixed_lengths) - unit
        if strategy.checkpointing
        else 0
    )
    at_heads = saved + 5 * row
    in_layer = saved - unit - row + recomputed + unit + num_tokens * model.intermediate_size * size
    at_embeddings = 2 * unit + row + model.vocab_size * model.hidden_size * size
    return max(at_heads, in_layer, at_embeddings)


def representation_bytes(model: ModelShape, strategy: Strategy, step: StepShape) -> int:
    """What the gradient cache keeps of all texts, and its gradient: multi-vector rows, dense vectors (fp32),
    lexical (id, weight) pairs."""
    num_texts = step.num_queries + step.num_passages
    rows = step.num_tokens * model.row_width * strategy.precision_bytes
    return 2 * (rows + num_texts * model.hidden_size * FP32 + step.num_tokens * FP32) + step.num_tokens * 8


def loss_bytes(model: ModelShape, strategy: Strategy, step: StepShape) -> dict[str, int]:
    """Peak of the loss over all ranks' passages: score matrices, MaxSim's winners and its backward pass,
    every rank's queries."""
    ranks, size, width = strategy.world_size, strategy.precision_bytes, model.row_width
    queries, passages, query_rows = (
        step.num_queries,
        step.num_passages,
        step.num_queries * step.query_tokens * ranks,
    )
    scores, rows, kept = queries * passages * ranks, query_rows, query_rows * passages
    needs_tiles = loss_needs_tiles(queries, passages * ranks, query_rows, passages)
    if step.loss_tiles == "always" or (step.loss_tiles == "auto" and needs_tiles):
        side = texts_per_tile(step.query_tokens)
        group = -(-passages // max(1, queries))
        scores, rows = (
            min(side, queries * ranks) * min(side, passages),
            min(side, queries * ranks) * step.query_tokens,
        )
        passages = min(side, passages)
        # the queries' own groups keep an ordinary graph, tiles only their own winners
        kept = rows * passages + queries * step.query_tokens * min(
            step.num_passages, GROUP_TILE_TEXTS * group
        )
    product = products_at_a_time(strategy.on_gpu)
    return {
        "score matrices": scores * SCORE_MATRICES * FP32,
        "MaxSim": kept * INT32
        + _maxsim_backward(strategy, rows, passages, step.passage_tokens, width)
        + product * FP32,
        "gathered queries": query_rows * width * ((size if ranks > 1 else 0) + 2 * FP32),
    }


def _maxsim_backward(
    strategy: Strategy, query_rows: int, num_passages: int, passage_tokens: int, width: int
) -> int:
    """Pairs in work at a time: chunks of passages, and of query rows where those are widened."""
    product = products_at_a_time(strategy.on_gpu)
    held_rows = rows_widened_at_a_time(product, width, strategy.on_gpu)
    per_sort = passages_at_a_time(product, query_rows)
    texts = max(1, min(num_passages, held_rows // max(1, passage_tokens), per_sort))
    rows = query_rows if strategy.precision_bytes == FP32 else min(query_rows, held_rows)
    return rows * texts * WINNER_BYTES


def plan_memory(
    model: ModelShape, strategy: Strategy, step: StepShape, mixed_lengths: bool = True
) -> MemoryPlan:
    """Everything one rank holds at the worst moment of a step."""
    activations = activation_bytes(model, strategy, step.pass_tokens, step.longest_tokens, mixed_lengths)
    states, loss = state_bytes(model, strategy), loss_bytes(model, strategy, step)
    if step.chunk_tokens is None:
        # the forward pass is saved while the loss runs; when the encoder's backward pass starts, the loss has
        # gone
        saved = saved_bytes(model, strategy, step.pass_tokens, step.longest_tokens, mixed_lengths)
        gradients = representation_bytes(model, strategy, step) // 2
        if saved + gradients + sum(loss.values()) > activations:
            return MemoryPlan(states, {"activations": saved, "representations": gradients, **loss})
        return MemoryPlan(states, {"activations": activations})
    # either the loss or a chunk's graph is alive, never both
    kept = {"representations": representation_bytes(model, strategy, step)}
    during_loss = sum(loss.values()) > activations
    return MemoryPlan(states, {**kept, **(loss if during_loss else {"activations": activations})})


def largest_chunk(model: ModelShape, strategy: Strategy, step: StepShape, limit_bytes: int) -> int | None:
    """Most tokens of a gradient-cache chunk that stay within `limit_bytes`; None when not even the longest
    text fits."""

    def fits(chunk_tokens: int) -> bool:
        return (
            plan_memory(model, strategy, replace(step, chunk_tokens=chunk_tokens)).total_bytes <= limit_bytes
        )

    low, high = step.longest_tokens, max(step.num_tokens, step.longest_tokens)
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def remedies(
    model: ModelShape, strategy: Strategy, step: StepShape, limit_bytes: int
) -> list[tuple[str, int]]:
    """What makes a step fit that does not: settings to turn on, one after another, until it does; (setting,
    largest chunk) of the last.

    Empty when nothing helps. In the order of what they cost: recomputation, host memory, communication.
    """
    ladder = [
        ("engine.activation_checkpointing=true", {"checkpointing": True}),
        ("engine.activation_offload=true", {"activation_offload": True}),
        ("engine.template=zero2", {"zero_stage": max(2, strategy.zero_stage)}),
        ("engine.template=zero3", {"zero_stage": 3}),
        (
            "engine.template=zero3_offload",
            {"zero_stage": 3, "optimizer_offload": True, "parameter_offload": True},
        ),
    ]
    taken: list[str] = []
    for setting, change in ladder:
        changed = replace(strategy, **change)  # type: ignore[arg-type]
        if changed == strategy:
            continue
        strategy = changed
        taken = [
            name
            for name in taken
            if not (name.startswith("engine.template") and setting.startswith("engine.template"))
        ] + [setting]
        chunk = largest_chunk(model, strategy, step, limit_bytes)
        if chunk is not None:
            return [(name, chunk) for name in taken]
    return []
