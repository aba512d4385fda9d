"""What memory and time are counted from: sizes of a model, the strategy of a run, one rank's step.

`memory_report.py` builds them from a recipe, `memory.py` and `strategy.py` count.
"""

from dataclasses import dataclass
from typing import Literal

from megam3.encoders import LayerKind
from megam3.token_layers import TokenLayer


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of an encoder and of what is put on it; `planning/layers.py` counts its parameters."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    num_positions: int
    num_types: int = 1
    embedding_size: int = 0
    """Width of the tables where they are narrower (small ELECTRA models); 0: the encoder's."""
    layer: LayerKind = "post_norm"
    """Which tensors a layer keeps; the families in `megam3/encoders.py` say theirs."""
    query_width: int = 0
    """All query heads side by side; 0: the hidden size."""
    key_width: int = 0
    """All key heads side by side; 0: the queries' width."""
    norms_heads: bool = False
    """Queries and keys are normed head by head (Qwen 3, Gemma 3)."""
    qkv_bias: bool = True
    """Biases of queries, keys and values."""
    output_bias: bool = True
    """Bias of attention's output."""
    mlp_bias: bool = True
    """Biases of the feed-forward block."""
    norm_bias: bool = True
    """Biases of the norms."""
    multi_vector_dim: int = 0
    """0: as wide as the encoder."""
    multi_vector_layers: tuple[TokenLayer, ...] = ()
    """Layers of the multi-vector head; empty: one matrix."""
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    num_windowed_layers: int = 0
    """Layers that see a window only: fewer operations, equal memory."""
    window_reach: int = 0
    """Tokens that such a layer sees to each side."""
    is_causal: bool = False
    """Tokens see those before them and themselves: fewer operations, equal memory."""
    heads: tuple[str, ...] = ("dense", "lexical", "multi_vector")
    """Those that are computed; the others have no weights either."""
    num_dimensions: int = 0
    """Matryoshka dimensions of the dense head."""
    predictions_per_token: float = 0.0
    """Above 0: a masked-LM head projects so many rows a token onto the vocabulary (pretraining)."""
    has_decoder: bool = False
    """One more layer reads the encoder's output (RetroMAE)."""
    has_bag_of_words: bool = False
    """All rows are projected once more, pooled by text (DupMAE)."""
    expands: bool = False
    """The lexical head is a masked-LM head over the whole vocabulary (`model.lexical_kind: expansion`)."""
    frozen: tuple[str, ...] = ()
    """Of `model.freeze`: encoder, embeddings, positions."""
    frozen_layers: frozenset[int] = frozenset()
    """Of `model.freeze`: its layers."""
    lora_rank: int = 0
    """Above 0: adapters so wide are trained in the encoder's place (`model.lora`)."""
    lora_targets: tuple[str, ...] | None = None
    """Last parts of the names of adapted linear layers; None: all."""

    @property
    def row_width(self) -> int:
        """C; 0 without the multi-vector head."""
        if self.multi_vector_layers:
            return self.multi_vector_layers[-1].out_features
        return (self.multi_vector_dim or self.hidden_size) if "multi_vector" in self.heads else 0

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.query_width or self.hidden_size

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.key_width or self.queries

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.queries // self.num_attention_heads

    @property
    def has_lm_head(self) -> bool:
        """Whether rows are multiplied by the embedding matrix."""
        return bool(self.predictions_per_token) or self.expands


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
    reduces_once: bool = False
    """Stage 2: gradients of all chunks are summed whole on every rank and reduced once."""


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
