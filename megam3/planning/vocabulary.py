"""What is held while rows are multiplied by the embedding matrix: masked language modelling, RetroMAE's
decoder, DupMAE's bag of words, the expansion head. V entries of the vocabulary, H the encoder's width.

The masked-LM head keeps, for M predicted rows (all tokens for the decoder, the masked ones for the encoder),

    6·M·H         the rows picked, and joined, the product before and after GELU, what the norm gives, and its
                  gradient
    8·R·V         bytes: logits of R = 1024 rows at a time, in fp32, and their log-probabilities. In fp32 the
                  product comes without its bias first, which is as much; in half precision it is less
    4·V·H         bytes: the tied embeddings' gradient in fp32, from the forward to the backward pass
    3·V·H         at the step's end: that gradient waits in the model's precision for the one of the look-up,
                  and their sum

The decoder is a layer more, and four tensors of the stream's size: its embeddings' sum, what it reads, its
rows, and what they are made of.
"""

from dataclasses import replace

from megam3.planning.layers import FP32, layer_bytes
from megam3.planning.shapes import ModelShape, Strategy

LOGIT_ROWS = 1024
"""Rows whose logits exist at a time (`CHUNK_ROWS` of megam3/model/masked_lm.py; a test compares them)."""

EXPANSION_BLOCK = 1 << 25
MIN_EXPANSION_WIDTH = 256
"""Logits of the expansion head and of the bag of words held at a time, and their narrowest block
(`BLOCK_ELEMENTS` and `MIN_BLOCK` of megam3/model/expansion.py; a test compares them)."""

BAG_COPIES = 3
"""Tensors [tokens, block] in fp32 at the bag of words' gradients: logits, who won, and what it gets."""


def masked_lm_bytes(
    model: ModelShape, strategy: Strategy, num_tokens: int, longest_tokens: int, mixed_lengths: bool
) -> int:
    """The decoder and the masked-LM head at their peak, beside what the encoder saved."""
    size, hidden = strategy.precision_bytes, model.hidden_size
    is_half = size < FP32
    matrix = model.vocab_size * hidden
    rows = int(num_tokens * (model.predictions_per_token - model.has_bag_of_words))
    logits = min(rows, LOGIT_ROWS) * model.vocab_size
    kept = 6 * rows * hidden * size + matrix * FP32
    if model.has_decoder:
        # trained whole, whatever of the encoder is
        decoder = replace(model, lora_rank=0)
        kept += layer_bytes(decoder, strategy, num_tokens, longest_tokens, mixed_lengths)
        kept += 4 * num_tokens * hidden * size
    # forward: two fp32 tensors of logits, then one (its copy in half precision too) and a chunk's gradient
    moments = [logits * 2 * FP32, logits * (FP32 + is_half * size) + matrix * size]
    # backward: the gradient times the loss's own, and that in the model's precision
    moments.append(matrix * (FP32 + is_half * size))
    if model.has_bag_of_words:
        kept += num_tokens * hidden * (4 * size + FP32) + matrix * FP32
        moments.append(BAG_COPIES * FP32 * _block(model, num_tokens))
    return kept + max(moments)


def expansion_bytes(model: ModelShape, strategy: Strategy, num_tokens: int) -> int:
    """The expansion head at its backward pass: its own layers and their gradient, laid out gradients (of two
    blocks where there are several), and the embedding matrix's gradient with a block's part of it.

    Pairs are counted like token weights, one a token: a head that is not sparse yet has more, 20 bytes each.
    """
    size, hidden = strategy.precision_bytes, model.hidden_size
    block = _block(model, num_tokens)
    blocks = min(2 * block, num_tokens * model.vocab_size)
    gradient = (model.vocab_size + block // max(1, num_tokens)) * hidden
    return (5 * num_tokens * hidden + blocks + gradient) * size


def _block(model: ModelShape, num_tokens: int) -> int:
    """Entries of the logits held at a time."""
    width = max(EXPANSION_BLOCK // max(1, num_tokens), MIN_EXPANSION_WIDTH)
    return num_tokens * min(model.vocab_size, width)
