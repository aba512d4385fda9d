"""Build a small XLM-R-shaped encoder from nothing, with heads, in a state from which three heads learn within minutes.

A random encoder of this kind (post-norm, std 0.02) is nearly blind: the output of `<s>` depends on the text by one part in a thousand, so
the dense head starts near chance and, at a learning rate the other heads need, collapses. Three remedies, each an argument of its own:

- identity attention (Trockman & Kolter, *Mimetic Initialization of Self-Attention Layers*, 2023): W_q W_k and W_v W_o start near multiples
  of the identity, so a token attends to itself and its like, and `<s>`, which resembles none, starts as a pooler of all tokens;
- rarity coordinates: how rare a piece is can be counted before training (inverse document frequency), so each piece carries it in one
  coordinate per attention head; the lexical head starts by reading it, and `<s>` by attending to rare pieces;
- small position rows (std 0.002): with 8194 rows and short training, full-size ones would be noise that hides the words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, XLMRobertaConfig, XLMRobertaModel

from megam3.quickstart.tokenizer import FIRST_PIECE_ID


@dataclass(frozen=True)
class EncoderSize:
    """The shape of the encoder."""

    num_layers: int = 3
    hidden_size: int = 256
    num_heads: int = 4
    intermediate_size: int = 1024
    max_tokens: int = 8192
    dropout: float = 0.0
    """Minutes of training never over-fit by repetition alone; dropout costs more than it gives there."""


@dataclass(frozen=True)
class EncoderInit:
    """Where the weights start."""

    word_std: float = 0.02
    """Word embeddings, as in XLM-R."""
    position_std: float = 0.002
    """Position rows."""
    linear_std: float = 0.02
    """All matrices, before the identities below are added."""
    query_key_gain: float = 1.0
    """W_q = W_k = this times the identity, plus noise; 0 leaves the noise."""
    value_output_gain: float = 1.0
    """W_v W_o = this times the identity, plus noise; 0 leaves the noise."""
    rarity_gain: float = 1.0
    """Standard deviation of the rarity coordinates, in units of `word_std`; 0 leaves them random."""
    start_gain: float = 0.03
    """Length of the embedding of `<s>`, in units of a word's; it lies in the rarity coordinates, so that `<s>` attends to rare pieces, and
    is so small that the norm's epsilon keeps it small: the text then decides the dense vector. 0: `<s>` pools all pieces alike."""
    lexical_scale: float = 0.3
    """Lexical weight of a piece of average rarity."""


@dataclass(frozen=True)
class Rarity:
    """How rare each id is in the training passages."""

    rarity_V: Tensor
    """Square root of the inverse document frequency: the product of a query's and a passage's weight is then the idf."""
    mean: float
    """Over occurrences in passages, not the vocabulary, most of which is rare."""
    std: float

    def standard_V(self) -> Tensor:
        """Zero mean and unit variance over occurrences; zero for special tokens."""
        standard_V = (self.rarity_V - self.mean) / self.std
        standard_V[:FIRST_PIECE_ID] = 0.0
        return standard_V


def count_rarity(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> Rarity:
    """Count in how many `passages` each id occurs. Ids that never occur count as occurring in one."""
    frequency_V = torch.zeros(len(tokenizer))
    for start in range(0, len(passages), 256):
        for ids in tokenizer(list(passages[start : start + 256]))["input_ids"]:
            frequency_V[torch.tensor(sorted(set(ids)))] += 1
    frequency_V.clamp_(min=1)
    rarity_V = torch.log1p((len(passages) - frequency_V + 0.5).clamp(min=0) / (frequency_V + 0.5)).sqrt()
    share_V = frequency_V / frequency_V[FIRST_PIECE_ID:].sum()
    share_V[:FIRST_PIECE_ID] = 0.0
    mean = float((share_V * rarity_V).sum())
    std = float((share_V * (rarity_V - mean) ** 2).sum().sqrt())
    return Rarity(rarity_V, mean, max(std, 1e-6))


def rarity_coordinates(size: EncoderSize) -> list[int]:
    """The first coordinate of each attention head's slice."""
    return list(range(0, size.hidden_size, size.hidden_size // size.num_heads))


def encoder_config(size: EncoderSize, vocab_size: int) -> XLMRobertaConfig:
    """XLM-R's own settings where the class's defaults differ: layer_norm_eps, one token type, two more position rows than tokens."""
    return XLMRobertaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=size.max_tokens + 2,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=size.dropout,
        attention_probs_dropout_prob=size.dropout,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def _fill_matrices(model: XLMRobertaModel, init: EncoderInit, generator: torch.Generator) -> None:
    """Noise everywhere, identities on top in attention; norms stay at one, biases become zero."""
    query_key, value_output = math.sqrt(init.query_key_gain), math.sqrt(init.value_output_gain)
    gains = {
        "attention.self.query.weight": query_key,
        "attention.self.key.weight": query_key,
        "attention.self.value.weight": value_output,
        "attention.output.dense.weight": value_output,
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, init.linear_std, generator=generator)
            for ending, gain in gains.items():
                if name.endswith(ending):
                    parameter.diagonal().add_(gain)
        elif name.endswith("bias"):
            parameter.zero_()


def initialise(model: XLMRobertaModel, size: EncoderSize, init: EncoderInit, rarity: Rarity, generator: torch.Generator) -> None:
    """Fill every weight of `model` as the module's docstring says."""
    with torch.no_grad():
        _fill_matrices(model, init, generator)
        embeddings = model.embeddings
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.position_embeddings.weight.normal_(0.0, init.position_std, generator=generator)
        embeddings.position_embeddings.weight[:3] = 0.0  # padding's two rows, and the row of `<s>`
        words_VH = embeddings.word_embeddings.weight.normal_(0.0, init.word_std, generator=generator)
        coordinates = rarity_coordinates(size)
        if init.rarity_gain > 0:
            words_VH[:, coordinates] = (rarity.standard_V() * init.rarity_gain * init.word_std)[:, None]
        words_VH[:2] = 0.0  # `<s>` and padding
        words_VH[0, coordinates] = init.start_gain * init.word_std * math.sqrt(size.hidden_size / size.num_heads)


def initial_heads(
    size: EncoderSize, init: EncoderInit, rarity: Rarity, multi_vector_dim: int | None = None
) -> dict[str, dict[str, Tensor]]:
    """Head weights by file name.

    The lexical head reads the rarity coordinates (weight = lexical_scale · rarity / mean rarity); the multi-vector head is the identity (or
    its first rows, when narrower).
    """
    lexical_1H = torch.zeros(1, size.hidden_size)
    if init.rarity_gain > 0:
        slope = init.lexical_scale * rarity.std / rarity.mean
        lexical_1H[0, rarity_coordinates(size)] = slope / (init.rarity_gain * size.num_heads)
    dim = multi_vector_dim or size.hidden_size
    return {
        "sparse_linear.pt": {"weight": lexical_1H, "bias": torch.tensor([init.lexical_scale])},
        "colbert_linear.pt": {"weight": torch.eye(dim, size.hidden_size), "bias": torch.zeros(dim)},
    }


def build_encoder(
    tokenizer: PreTrainedTokenizerBase,
    passages: Iterable[str],
    folder: str | Path,
    size: EncoderSize,
    init: EncoderInit,
    seed: int = 0,
) -> XLMRobertaModel:
    """Build the encoder, save it with its heads to `folder`, where the tokenizer is already, and return it.

    `passages` are the training passages, for the document frequencies. The folder is then what `model.path` of a recipe wants.
    """
    folder = Path(folder)
    rarity = count_rarity(tokenizer, list(passages))
    model = XLMRobertaModel._from_config(encoder_config(size, len(tokenizer)), add_pooling_layer=False)
    initialise(model, size, init, rarity, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    for name, tensors in initial_heads(size, init, rarity).items():
        torch.save(tensors, folder / name)
    return model
