"""Build a small XLM-R-shaped encoder from nothing, with heads, in a state from which three heads learn within
minutes.

A random encoder of this kind (post-norm, std 0.02) is nearly blind: the output of `<s>` depends on the text
by one part in a thousand, so the dense head starts near chance and, at a learning rate the other heads need,
collapses. Four remedies, each an argument of its own:

- identity attention (Trockman & Kolter, *Mimetic Initialization of Self-Attention Layers*, 2023): W_q W_k and
  W_v W_o start near multiples of the identity, so a token attends to itself and its like, and `<s>`, which
  resembles none, starts as a pooler of all tokens;
- rarity coordinates: how rare a piece is can be counted before training (inverse document frequency), so each
  piece carries it in one coordinate per attention head; the lexical head starts by reading it, and `<s>` by
  attending to rare pieces;
- topics (latent semantic analysis, Deerwester et al., 1990): pieces that stand in the same passages start
  with similar embeddings, which counting and one truncated SVD give in seconds;
- small position rows (std 0.002): with 8194 rows and short training, full-size ones would be noise that hides
  the words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, XLMRobertaConfig, XLMRobertaModel

from examples.quickstart.tokenizer import FIRST_PIECE_ID
from megam3.files import permit_as_umask_does


@dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """The shape of the encoder."""

    num_layers: int = 3
    hidden_size: int = 256
    num_heads: int = 4
    intermediate_size: int = 1024
    max_tokens: int = 8192
    dropout: float = 0.0
    """Minutes of training never over-fit by repetition alone; dropout costs more than it gives there."""


@dataclass(frozen=True, kw_only=True)
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
    topic_share: float = 0.7
    """Share t of a piece's embedding, outside the rarity coordinates, that latent semantic analysis gives:
    t·topic + √(1 - t²)·noise. The noise tells pieces of one topic apart, which exact matching needs. 0: noise
    alone."""
    start_gain: float = 0.03
    """Length of the embedding of `<s>`, in units of a word's; it lies in the rarity coordinates, so that
    `<s>` attends to rare pieces, and is so small that the norm's epsilon keeps it small: the text then
    decides the dense vector. 0: `<s>` pools all pieces alike."""
    lexical_scale: float = 0.3
    """Lexical weight of a piece of average rarity."""


@dataclass(frozen=True, kw_only=True)
class PassageCounts:
    """Which ids occur how often in which training passage: the non-zero entries of a [passages, V] matrix,
    special tokens left out."""

    num_passages: int
    vocab_size: int
    passage_Z: Tensor
    ids_Z: Tensor
    counts_Z: Tensor


def count_pieces(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> PassageCounts:
    """Count the ids of every passage."""
    columns: list[Tensor] = []
    counts: list[Tensor] = []
    for start in range(0, len(passages), 256):
        for ids in tokenizer(list(passages[start : start + 256]))["input_ids"]:
            found, times = torch.tensor(ids).unique(return_counts=True)
            known = (found >= FIRST_PIECE_ID) & (found != tokenizer.mask_token_id)
            columns.append(found[known])
            counts.append(times[known])
    lengths = torch.tensor([len(column) for column in columns])
    passage_Z = torch.repeat_interleave(torch.arange(len(passages)), lengths)
    return PassageCounts(
        num_passages=len(passages),
        vocab_size=len(tokenizer),
        passage_Z=passage_Z,
        ids_Z=torch.cat(columns),
        counts_Z=torch.cat(counts).float(),
    )


@dataclass(frozen=True)
class Rarity:
    """How rare each id is in the training passages."""

    rarity_V: Tensor
    """Square root of the inverse document frequency: the product of a query's and a passage's weight is then
    the idf."""
    mean: float
    """Over occurrences in passages, not over the vocabulary, most of which is rare."""
    std: float

    def standard_V(self) -> Tensor:
        """Zero mean and unit variance over occurrences; zero for special tokens."""
        standard_V = (self.rarity_V - self.mean) / self.std
        standard_V[:FIRST_PIECE_ID] = 0.0
        return standard_V


def measure_rarity(counts: PassageCounts) -> Rarity:
    """BM25's idf of every id; ids that never occur count as occurring in one passage."""
    frequency_V = torch.bincount(counts.ids_Z, minlength=counts.vocab_size).float().clamp(min=1)
    rarity_V = torch.log1p(
        (counts.num_passages - frequency_V + 0.5).clamp(min=0) / (frequency_V + 0.5)
    ).sqrt()
    share_V = frequency_V / frequency_V[FIRST_PIECE_ID:].sum()
    share_V[:FIRST_PIECE_ID] = 0.0
    mean = float((share_V * rarity_V).sum())
    std = float((share_V * (rarity_V - mean) ** 2).sum().sqrt())
    return Rarity(rarity_V, mean, max(std, 1e-6))


def find_topics(counts: PassageCounts, rarity: Rarity, num_topics: int, seed: int) -> Tensor:
    """Latent semantic analysis: a vector of unit variance per id, [V, topics], zero for ids that never occur.

    Entries (1 + log count)·idf, passages scaled to length one, truncated SVD U·S·Vᵀ; an id's vector is its
    row of V·√S, scaled.
    """
    num_topics = min(num_topics, counts.num_passages, counts.vocab_size)
    values_Z = (1 + counts.counts_Z.log()) * rarity.rarity_V[counts.ids_Z] ** 2
    lengths_N = torch.zeros(counts.num_passages).index_add_(0, counts.passage_Z, values_Z**2).sqrt()
    indices = torch.stack([counts.passage_Z, counts.ids_Z])
    shape = (counts.num_passages, counts.vocab_size)
    matrix = torch.sparse_coo_tensor(
        indices, values_Z / lengths_N[counts.passage_Z], shape, check_invariants=False
    ).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the SVD starts from random directions
        _, singular_S, topics_VS = torch.svd_lowrank(matrix, q=num_topics, niter=2)
    return torch.nn.functional.normalize(topics_VS * singular_S.sqrt(), dim=1) * math.sqrt(num_topics)


def rarity_coordinates(size: EncoderSize) -> list[int]:
    """The first coordinate of each attention head's slice."""
    return list(range(0, size.hidden_size, size.hidden_size // size.num_heads))


def encoder_config(size: EncoderSize, vocab_size: int) -> XLMRobertaConfig:
    """XLM-R's own settings where the class's defaults differ: layer_norm_eps, one token type, two more
    position rows than tokens."""
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


def initialise(
    model: XLMRobertaModel,
    size: EncoderSize,
    init: EncoderInit,
    rarity: Rarity,
    topics_VS: Tensor | None,
    generator: torch.Generator,
) -> None:
    """Fill every weight of `model` as the module's docstring says."""
    with torch.no_grad():
        _fill_matrices(model, init, generator)
        embeddings = model.embeddings
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.position_embeddings.weight.normal_(0.0, init.position_std, generator=generator)
        embeddings.position_embeddings.weight[:3] = 0.0  # padding's two rows, and the row of `<s>`
        words_VH = embeddings.word_embeddings.weight.normal_(0.0, init.word_std, generator=generator)
        coordinates = rarity_coordinates(size)
        if topics_VS is not None:
            free = [column for column in range(size.hidden_size) if column not in coordinates][
                : topics_VS.shape[1]
            ]
            noise_share = math.sqrt(1 - init.topic_share**2)
            known_V = topics_VS.abs().sum(1) > 0
            mixed = noise_share * words_VH[:, free] + init.topic_share * init.word_std * topics_VS
            words_VH[:, free] = torch.where(known_V[:, None], mixed, words_VH[:, free])
        if init.rarity_gain > 0:
            words_VH[:, coordinates] = (rarity.standard_V() * init.rarity_gain * init.word_std)[:, None]
        words_VH[:2] = 0.0  # `<s>` and padding
        words_VH[0, coordinates] = (
            init.start_gain * init.word_std * math.sqrt(size.hidden_size / size.num_heads)
        )


def initial_heads(
    size: EncoderSize, init: EncoderInit, rarity: Rarity, multi_vector_dim: int | None = None
) -> dict[str, dict[str, Tensor]]:
    """Head weights by file name.

    The lexical head reads the rarity coordinates (weight = lexical_scale · rarity / mean rarity); the
    multi-vector head is the identity (or its first rows, when narrower).
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

    `passages` are the training passages, for the document frequencies. The folder is then what `model.path`
    of a recipe wants.
    """
    folder = Path(folder)
    counts = count_pieces(tokenizer, list(passages))
    rarity = measure_rarity(counts)
    topics_VS = (
        find_topics(counts, rarity, size.hidden_size - size.num_heads, seed) if init.topic_share > 0 else None
    )
    model = XLMRobertaModel._from_config(encoder_config(size, len(tokenizer)), add_pooling_layer=False)
    initialise(model, size, init, rarity, topics_VS, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    permit_as_umask_does(folder)
    for name, tensors in initial_heads(size, init, rarity).items():
        torch.save(tensors, folder / name)
    return model
