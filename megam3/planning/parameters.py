"""How many parameters a model has, and how many of them are trained. Exact: the tests build each family on
torch's meta device and count."""

from megam3.planning.layers import adapted_layers, linear_sizes
from megam3.planning.multi_vector import multi_vector_parameters
from megam3.planning.shapes import ModelShape


def num_parameters(model: ModelShape) -> int:
    """All weights: embeddings, layers, adapters, decoder, heads."""
    decoder = layer_parameters(model) if model.has_decoder else 0
    return encoder_parameters(model) + adapter_parameters(model) + decoder + head_parameters(model)


def num_trained(model: ModelShape) -> int:
    """Those with a gradient and optimizer state."""
    return num_parameters(model) - frozen_parameters(model)


def head_parameters(model: ModelShape) -> int:
    """The lexical and the multi-vector head, and the masked-LM head, whose projection is the embedding
    matrix."""
    hidden = model.hidden_size
    heads = multi_vector_parameters(model)
    if "lexical" in model.heads and not model.expands:
        heads += hidden + 1
    if model.has_lm_head:
        heads += hidden * (hidden + 1) + 2 * hidden + model.vocab_size
    return heads


def layer_parameters(model: ModelShape) -> int:
    """Of one layer, adapters not included."""
    hidden, queries, keys = model.hidden_size, model.queries, model.keys
    matrices = sum(width * out for width, out in linear_sizes(model).values())
    biases = (queries + 2 * keys) * model.qkv_bias + hidden * model.output_bias
    inner = model.intermediate_size * (1 if model.layer == "post_norm" else 2)
    biases += (inner + hidden) * model.mlp_bias
    num_norms = 4 if model.layer == "rms_wide" else 2
    norms = num_norms * hidden * (1 + model.norm_bias)
    return matrices + biases + norms + 2 * model.head_dim * model.norms_heads


def adapter_parameters(model: ModelShape) -> int:
    """LoRA's two matrices of every adapted linear layer, all layers."""
    sizes = linear_sizes(model)
    return model.num_layers * sum(model.lora_rank * sum(sizes[name]) for name in adapted_layers(model))


def embedding_parameters(model: ModelShape) -> int:
    """Tables and their norm, and the projection of an encoder whose tables are narrower than it is."""
    width = model.embedding_size or model.hidden_size
    if model.layer == "post_norm":
        tables = (model.vocab_size + model.num_positions + model.num_types) * width + 2 * width
        return tables + (model.hidden_size * (width + 1) if width != model.hidden_size else 0)
    if model.layer == "gated":
        return model.vocab_size * width + width * (1 + model.norm_bias)
    return model.vocab_size * width


def encoder_parameters(model: ModelShape) -> int:
    """Embeddings, layers and, where the norms come before the blocks, the last norm."""
    layers = model.num_layers * layer_parameters(model)
    # ModernBERT's first layer has no norm before its attention, which makes up for the last one
    last = model.hidden_size if model.layer in ("rms", "rms_wide") else 0
    return embedding_parameters(model) + layers + last


def frozen_parameters(model: ModelShape) -> int:
    """Of the encoder: what gets no gradient and no optimizer state."""
    if model.lora_rank or "encoder" in model.frozen:
        return encoder_parameters(model)
    count = len(model.frozen_layers) * layer_parameters(model)
    if model.layer == "gated" and 0 in model.frozen_layers:
        count -= model.hidden_size * (1 + model.norm_bias)  # the norm that the first layer does not have
    if "embeddings" in model.frozen:
        # the projection of narrow tables is a part of the encoder beside them
        width = model.embedding_size or model.hidden_size
        projection = model.hidden_size * (width + 1) if width != model.hidden_size else 0
        return count + embedding_parameters(model) - projection
    if "positions" in model.frozen and model.layer == "post_norm":
        count += model.num_positions * (model.embedding_size or model.hidden_size)
    return count
