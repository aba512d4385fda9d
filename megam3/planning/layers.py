"""Encoder layers: their linear layers, and which tensors autograd keeps of them. Pure arithmetic.

What one layer keeps for its backward pass, in entries a token, for width H, inner width I, query heads Q wide
together and key heads K wide together (Q = K = H in the encoders of the BERT family):

    post_norm     8·H + 2·I       BERT: its input (read by query, key and value), query, key, value, attention
                                  output, both sums before the norms, the first norm's output; the inner
                                  product before and after GELU
    gated         10·H + 4·I      ModernBERT: two inputs of norms, what they give, query, key and value
                                  together, turned query and key, attention output; both inner products, the
                                  first after GELU, and their product
    rms           4·H + 2·(H) + 2·Q + 2·K + 4·I
                                  Llama, Mistral, Qwen, EuroBERT: of two norms the quotient, what they give,
                                  and (H) their input widened to fp32; turned query and key, value, attention
                                  output; gated block as above. Qwen 3 norms its heads too: Q + K + (Q + K)
    rms_wide      2·H + 8·(H) + 2·(Q + K) + 2·Q + 2·K + 4·I
                                  Gemma 3: four norms and the heads' two, all of them in fp32

(H) are entries of fp32 whatever the model's precision. To all come an fp32 log-sum-exp of attention a query
head, and an fp32 statistic or two of each norm. Keys shared by a group of query heads are kept once. Windows
change operations, not memory (on GPUs: the plain attention of CPUs copies each block's neighbours).

    +T·Q          on a CPU, texts of several lengths: attention outputs per length and joined
    +2·T·H        entries of dropout's two masks: one byte each on CUDA, a factor in full precision on a CPU
                  (ModernBERT: T·I of the gated product, T·H of attention's output; the others have none)
    +3·T·A·L      attention dropout leaves the kernel on a CPU: softmax, mask and product, longest text L

A layer whose weights are frozen keeps no inputs of its linear layers, because no weight's gradient reads
them; where LoRA adapts a linear layer, its input is back and `rank` entries beside it. Below the lowest
trained parameter nothing is kept at all.

The tests read all of this from autograd itself, to the byte, family by family.
"""

from megam3.planning.shapes import ModelShape, Strategy

FP32 = 4

LINEAR_LAYERS = {
    "post_norm": (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "gated": ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
    "rms": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
}
"""Linear layers by their names in transformers, from the input of a layer to its output; those of `rms_wide`
are called as those of `rms`."""


def linear_sizes(model: ModelShape) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer of one encoder layer, by name."""
    hidden, inner, queries, keys = model.hidden_size, model.intermediate_size, model.queries, model.keys
    if model.layer == "post_norm":
        sizes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        sizes += [(hidden, inner), (inner, hidden)]
    elif model.layer == "gated":
        sizes = [(hidden, queries + 2 * keys), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    else:
        sizes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        sizes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    return dict(zip(_names(model), sizes, strict=True))


def adapted_layers(model: ModelShape) -> tuple[str, ...]:
    """Linear layers that LoRA adapts, chosen as peft does: by the last parts of their names."""
    if not model.lora_rank:
        return ()
    wanted = model.lora_targets
    return tuple(
        name
        for name in _names(model)
        if wanted is None or any(name == each or name.endswith(f".{each}") for each in wanted)
    )


def lowest_trained_layer(model: ModelShape) -> int:
    """Layers below it keep nothing; the number of layers where none is in the graph."""
    if model.lora_rank:
        return 0
    if "encoder" in model.frozen:
        return model.num_layers
    if not {"embeddings"} & set(model.frozen):
        return 0
    free = [number for number in range(model.num_layers) if number not in model.frozen_layers]
    return free[0] if free else model.num_layers


def layer_bytes(
    model: ModelShape,
    strategy: Strategy,
    num_tokens: int,
    longest_tokens: int,
    mixed_lengths: bool = True,
    *,
    is_frozen: bool = False,
) -> int:
    """What one layer saves for its backward pass, its input included; the table at the top of this file.

    `is_frozen`: its own weights are, and something below it is trained.
    """
    adapted = set(adapted_layers(model))
    narrow, wide = _entries(model, adapted, is_trained=not (is_frozen or model.lora_rank))
    if mixed_lengths and not strategy.on_gpu:
        narrow += model.queries
    size, heads = strategy.precision_bytes, model.num_attention_heads
    per_token = narrow * size + wide * FP32 + len(adapted) * model.lora_rank * size
    per_token += _dropped(model) * (1 if strategy.on_gpu else size)
    if model.attention_dropout and not strategy.on_gpu:
        per_token += 3 * heads * longest_tokens * size
    else:
        per_token += heads * FP32
    return num_tokens * per_token + _saved_scales(model)


def bottom_bytes(model: ModelShape, strategy: Strategy, num_tokens: int) -> int:
    """What is kept below the layers: the embeddings' sum before its norm, or, where layers turn queries and
    keys by wide tables, the angles that all of them share."""
    size, hidden = strategy.precision_bytes, model.hidden_size
    if model.layer in ("rms", "rms_wide"):
        return num_tokens * 2 * model.head_dim * size * (2 if model.layer == "rms_wide" else 1)
    has_frozen_tables = model.lora_rank or {"encoder", "embeddings"} & set(model.frozen)
    mask = hidden * (1 if strategy.on_gpu else size) if model.hidden_dropout else 0
    sums = 0 if has_frozen_tables else 1
    if model.layer == "gated" and lowest_trained_layer(model) == 0 and not strategy.checkpointing:
        sums -= 1  # the first layer has no norm, whose input all others keep
    return num_tokens * (mask + sums * hidden * size)


def top_bytes(model: ModelShape, strategy: Strategy, num_tokens: int) -> int:
    """What is kept above the layers: the last hidden states, and of encoders whose norms come first the last
    norm's tensors."""
    hidden = num_tokens * model.hidden_size
    states = hidden * strategy.precision_bytes
    if model.layer == "post_norm" or "encoder" in model.frozen:
        return states
    if model.layer == "gated":
        return 2 * states
    quotient = (
        hidden * (FP32 if model.layer == "rms_wide" else strategy.precision_bytes) * (not model.lora_rank)
    )
    return states + quotient + hidden * FP32 + num_tokens * FP32


def encoding_width(model: ModelShape) -> int:
    """Entries a token that a layer holds at its widest while nothing is kept for a backward pass."""
    hidden, queries, keys = model.hidden_size, model.queries, model.keys
    if model.layer == "post_norm":
        return max(hidden + 2 * queries + 2 * keys, 2 * hidden + 2 * model.intermediate_size)
    # turning queries and keys takes three tensors of their size
    turning = 2 * hidden + queries + 2 * keys + 3 * (queries + keys)
    return max(turning, 2 * hidden + 4 * model.intermediate_size)


def backward_width(model: ModelShape, strategy: Strategy) -> int:
    """Bytes a token of what the last layer's backward pass adds at its widest: the gradients around the inner
    product, or around a norm, which are fp32 where norms are."""
    size, hidden, inner = strategy.precision_bytes, model.hidden_size, model.intermediate_size
    if model.layer == "post_norm":
        return max(inner, 2 * hidden) * size
    around_inner = (2 * inner + hidden * (size < FP32)) * size
    if model.layer == "gated" and model.lora_rank:
        around_inner += 2 * inner * size  # an adapter scales the gradient of both projections at once
    around_norm = {
        "gated": 2 * hidden * size,
        "rms": 5 * hidden * FP32 // 2,
        "rms_wide": 9 * hidden * FP32 // 2,
    }
    return max(around_inner, around_norm[model.layer])


def _names(model: ModelShape) -> tuple[str, ...]:
    return LINEAR_LAYERS["rms" if model.layer == "rms_wide" else model.layer]


def _dropped(model: ModelShape) -> int:
    """Entries a token of dropout's masks beside attention's own."""
    if model.layer == "post_norm":
        return 2 * model.hidden_size if model.hidden_dropout else 0
    if model.layer == "gated":
        # of the gated product, and of attention's output
        of_product = model.intermediate_size if model.hidden_dropout else 0
        return of_product + (model.hidden_size if model.attention_dropout else 0)
    return 0


def _saved_scales(model: ModelShape) -> int:
    """Gemma 3 multiplies by 1 + weight, a tensor of its own: four of a layer, two of its heads."""
    scales = 4 * model.hidden_size + 2 * model.head_dim * model.norms_heads
    return scales * FP32 if model.layer == "rms_wide" else 0


def _entries(model: ModelShape, adapted: set[str], *, is_trained: bool) -> tuple[int, int]:
    """Entries a token of the model's precision, and of fp32, that one layer keeps; log-sum-exps aside."""
    hidden, inner, queries, keys = model.hidden_size, model.intermediate_size, model.queries, model.keys
    names = _names(model)

    def reads(*places: int) -> bool:
        """Whether a weight of these linear layers, or an adapter there, needs their input."""
        return is_trained or any(names[place] in adapted for place in places)

    if model.layer == "post_norm":
        # query, key, value, attention output and both sums; inner product before GELU
        always = 2 * queries + 2 * keys + 2 * hidden + inner
        inputs = hidden * (reads(0, 1, 2) + reads(4)) + inner * reads(5)
        return always + inputs, 2 * 2
    if model.layer == "gated":
        # query, key and value together and again as the kernel reads them; inputs of both norms
        always = (queries + 2 * keys) + 2 * queries + keys + 2 * hidden + 3 * inner
        return always + hidden * (reads(0) + reads(2)) + inner * reads(3), 2 * 2
    heads, key_heads = model.num_attention_heads, keys // model.head_dim
    narrow = 2 * queries + 2 * keys + 3 * inner
    narrow += hidden * (reads(0, 1, 2) + reads(4, 5)) + inner * reads(6)
    if model.layer == "rms":
        wide = 2 * (hidden + 1) + model.norms_heads * (queries + keys + heads + key_heads)
        # the quotient is read by the weight's gradient alone
        narrow += is_trained * (2 * hidden + model.norms_heads * (queries + keys))
        return narrow, wide
    num_copies = 2 if is_trained else 1
    wide = 4 * (num_copies * hidden + 1)
    wide += model.norms_heads * (num_copies * (queries + keys) + heads + key_heads)
    return narrow, wide
