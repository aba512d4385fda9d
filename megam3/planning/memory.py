"""How much memory one rank needs, by counting: model states per ZeRO stage, what autograd saves,
representations, loss. Pure arithmetic.

    parameters.py   how many there are, and how many are trained
    layers.py       what a layer keeps for its backward pass
    multi_vector.py a multi-vector head of several layers
    vocabulary.py   logits of masked language modelling and of the expansion head
    scores.py       representations of all texts, and the loss over them
    here            model states, the moments of a pass that compete for the peak, and the sum

Checkpointed, a layer keeps its input alone, and one layer at a time has all of its tensors. Offloaded, that
input waits in host memory. Pretraining on texts has no representations to keep.
"""

from dataclasses import replace

from megam3.config.deepspeed import FP32_SUMS_FROM_STAGE
from megam3.planning.layers import (
    FP32,
    backward_width,
    bottom_bytes,
    encoding_width,
    layer_bytes,
    lowest_trained_layer,
    top_bytes,
)
from megam3.planning.multi_vector import backward_entries, kept_entries
from megam3.planning.parameters import num_parameters, num_trained
from megam3.planning.scores import loss_bytes, representation_bytes
from megam3.planning.shapes import MemoryPlan, ModelShape, StepShape, Strategy
from megam3.planning.vocabulary import expansion_bytes, masked_lm_bytes


def state_bytes(model: ModelShape, strategy: Strategy) -> dict[str, int]:
    """Model states on the device of one rank (arXiv 1910.02054, section 3, and DeepSpeed's buffers).

    Per trained parameter: weight and gradient in the model's precision (from stage 2 on gradients are summed
    in fp32), fp32 master (every stage but 0 in fp32 keeps one), two fp32 moments, and an fp32 gradient while
    AdamW runs. Stage 1 shares the fp32 part, stage 2 gradients too, stage 3 everything. A frozen parameter is
    a weight and nothing else.
    """
    stage, ranks, precision = strategy.zero_stage, strategy.world_size, strategy.precision_bytes
    count, trained = num_parameters(model), num_trained(model)

    def share(number: int, first_stage: int) -> int:
        return -(-number // ranks) if stage >= first_stage else number

    has_master = stage > 0 or precision != FP32
    weights = 0 if strategy.parameter_offload else share(count, 3) * precision
    if stage == 3 and ranks > 1:
        weights += min(count, strategy.live_parameters or count) * precision
    gradients = share(trained, 2) * (FP32 if stage >= FP32_SUMS_FROM_STAGE else precision)
    if strategy.reduces_once and stage == 2:
        # the fp32 sum and one pass's gradient; the rank's share appears while the sums go
        gradients = trained * (FP32 + (precision if precision != FP32 else 0))
    optimizer = share(trained, 1) * ((2 * FP32 if has_master else 0) + 2 * FP32)
    buckets = strategy.bucket_elements if strategy.on_gpu else min(strategy.bucket_elements, trained)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 0 if strategy.optimizer_offload else optimizer,
        "buckets": buckets * precision if stage > 0 else 0,
    }


def saved_bytes(
    model: ModelShape, strategy: Strategy, num_tokens: int, longest_tokens: int, mixed_lengths: bool = True
) -> int:
    """What a forward pass over `num_tokens` leaves for the backward pass, and its multi-vector rows
    themselves."""
    size = strategy.precision_bytes
    # rows before and after their normalisation
    head = num_tokens * (kept_entries(model) + 2 * model.row_width) * size
    unit = num_tokens * model.hidden_size * size
    lowest = lowest_trained_layer(model)
    in_graph = model.num_layers - lowest
    if not in_graph:
        return top_bytes(model, strategy, num_tokens) + head
    frozen = sum(number >= lowest for number in model.frozen_layers)
    whole, thin = (
        layer_bytes(model, strategy, num_tokens, longest_tokens, mixed_lengths, is_frozen=is_frozen)
        for is_frozen in (False, True)
    )
    kept = (in_graph - frozen) * whole + frozen * thin
    if strategy.checkpointing:
        # offload keeps the newest input or two on the device, whatever the depth
        kept = unit * (min(2, in_graph) if strategy.activation_offload and strategy.on_gpu else in_graph)
    outside = bottom_bytes(model, strategy, num_tokens) + top_bytes(model, strategy, num_tokens)
    return outside + kept + head


def activation_bytes(
    model: ModelShape, strategy: Strategy, num_tokens: int, longest_tokens: int, mixed_lengths: bool = True
) -> int:
    """Peak of one forward and backward pass over `num_tokens`, parameter gradients not included.

    The backward pass adds gradients to what the forward pass saved, and frees it layer by layer. Four
    moments compete: at the heads, five temporaries of the rows' size (their gradient, its quotient by the
    norm, three for the norm's own) beside the dense head's gradient, or what the vocabulary's rows hold; in
    a multi-vector head of several layers, one copy of the rows gone; in the last layer, recomputed when
    checkpointed, the gradients before and after the inner product, while last hidden states and one copy of
    the rows are gone; and the word embeddings' gradient, a whole matrix before it is added to what earlier
    chunks left. Where rows were multiplied by that matrix, its gradient from there waits all the while.
    """
    size = strategy.precision_bytes
    unit, row = num_tokens * model.hidden_size * size, num_tokens * model.row_width * size
    saved = saved_bytes(model, strategy, num_tokens, longest_tokens, mixed_lengths)
    trains_tables = not (model.lora_rank or {"encoder", "embeddings"} & set(model.frozen))
    matrix = model.vocab_size * (model.embedding_size or model.hidden_size) * size if trains_tables else 0
    waiting = matrix if model.has_lm_head else 0
    # norms are taken in fp32, and so are their gradients
    in_graph = lowest_trained_layer(model) < model.num_layers or trains_tables
    at_heads = saved + unit * in_graph + 5 * num_tokens * model.row_width * FP32
    in_head = saved - row + unit * in_graph + backward_entries(model, num_tokens) * size
    if model.predictions_per_token:
        at_heads = saved + masked_lm_bytes(model, strategy, num_tokens, longest_tokens, mixed_lengths)
    if model.expands:
        at_heads += expansion_bytes(model, strategy, num_tokens)
    at_embeddings = 2 * unit + row + matrix + 2 * waiting
    if not in_graph:
        return max(at_heads, in_head, num_tokens * encoding_width(model) * size)
    recomputed = 0
    if strategy.checkpointing:
        recomputed = layer_bytes(model, strategy, num_tokens, longest_tokens, mixed_lengths) - unit
    gradients = num_tokens * backward_width(model, strategy)
    # the hidden states' gradient is there, and the tensors above the layers are not
    gone = top_bytes(model, strategy, num_tokens) + row + num_tokens * kept_entries(model) * size
    in_layer = saved - gone + recomputed + unit + gradients + waiting
    return max(at_heads, in_head, in_layer, at_embeddings)


def plan_memory(
    model: ModelShape, strategy: Strategy, step: StepShape, mixed_lengths: bool = True
) -> MemoryPlan:
    """Everything one rank holds at the worst moment of a step."""
    activations = activation_bytes(model, strategy, step.pass_tokens, step.longest_tokens, mixed_lengths)
    states = state_bytes(model, strategy)
    if model.predictions_per_token:
        # the loss is part of every pass, and nothing waits between passes
        return MemoryPlan(states, {"activations": activations})
    loss = loss_bytes(model, strategy, step)
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
