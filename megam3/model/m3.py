"""The M3 model: one encoder, three heads, one forward pass over a packed stream.

State-dict keys: `encoder.*` (the Hugging Face encoder's own keys), `lexical_head.{weight,bias}`,
`multi_vector_head.{weight,bias}`; where that head has several layers, `multi_vector_head.N.linear.*` and
`multi_vector_head.N.residual.weight` (`projection.py`); in the place of `lexical_head`, where the recipe asks
for expansion, `expansion_head.*`, a masked-LM head whose projection is the embedding matrix.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megam3.batch import Representations
from megam3.config.weights import HEADS
from megam3.encoders import EncoderShape, read_shape
from megam3.model.backbone import encode_packed, max_text_tokens
from megam3.model.expansion import expand
from megam3.model.heads import lexical_weights, multi_vector_rows, normalize_rows
from megam3.model.masked_lm import MaskedLMHead
from megam3.model.pooling import insert_cls, own_rows, pool_stream
from megam3.model.projection import Projection, init_linear, init_projection
from megam3.packed_texts import PackedTexts
from megam3.reading import Reading
from megam3.token_layers import TokenLayer

HEAD_PREFIXES = ("lexical_head.", "multi_vector_head.", "expansion_head.")
"""Parameters whose names start with one of these belong to the heads; they may have a learning rate of their
own."""

M3_READING = Reading()
"""The paper's: the dense vector is the first token's."""


class M3Model(nn.Module):
    """Encoder with a lexical head (D → 1) and a multi-vector head (D → C). The dense head has no weights.

    Args:
        encoder: an encoder set to packed attention (`load_backbone`).
        special_ids: ids that weigh nothing lexically: `<s>`, `</s>`, `<pad>`, `<unk>`.
        multi_vector_dim: C; None: the encoder's hidden size.
        multi_vector_layers: the layers of the multi-vector head; empty: one matrix, D → C.
        lexical_init_bias: see `init_heads`.
        heads: which heads exist; the others have no weights, and the representations hold nothing of them.
        expands: the lexical head weighs the whole vocabulary by masked-LM logits (`expansion.py`) instead of
            a text's own tokens.
        expansion_top_k: pairs of a text that such a head keeps outside training; None: all above zero.
        reading: how the dense vector is made.
        first_id: the special token that the tokenizer puts first; None: it puts none, and then every token
            has a multi-vector row, where M3 leaves the first out.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        special_ids: Iterable[int],
        *,
        multi_vector_dim: int | None = None,
        multi_vector_layers: Sequence[TokenLayer] = (),
        lexical_init_bias: float = 0.3,
        heads: Collection[str] = HEADS,
        expands: bool = False,
        expansion_top_k: int | None = None,
        reading: Reading = M3_READING,
        first_id: int | None = 0,
    ):
        super().__init__()
        hidden_size = encoder.config.hidden_size
        self.encoder = encoder
        self.special_ids = tuple(sorted(set(special_ids)))
        self.reading, self.first_id = reading, first_id
        self.heads = tuple(name for name in HEADS if name in heads)
        has_weights = "lexical" in heads
        self.lexical_head = nn.Linear(hidden_size, 1) if has_weights and not expands else None
        self.expansion_head, self.expansion_top_k = None, expansion_top_k
        if has_weights and expands:
            config = encoder.config
            self.expansion_head = MaskedLMHead(hidden_size, config.vocab_size, config.layer_norm_eps)
        self.multi_vector_head: nn.Linear | Projection | None = None
        if "multi_vector" in heads and multi_vector_layers:
            self.multi_vector_head = Projection(multi_vector_layers)
        elif "multi_vector" in heads:
            self.multi_vector_head = nn.Linear(hidden_size, multi_vector_dim or hidden_size)
        init_heads(self, lexical_init_bias)

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens_N1: Tensor,
        lengths: tuple[int, ...],
        pair_T: Tensor | None = None,
        ids_Z: Tensor | None = None,
        lexical_offsets_N1: Tensor | None = None,
        heads: Collection[str] = HEADS,
    ) -> tuple[Tensor, ...]:
        """The tensors of Representations, in order, as a plain tuple (ZeRO-3's hooks find tensors in tuples,
        lists and dicts only).

        Args:
            pair_T, ids_Z, lexical_offsets_N1: of `LexicalPairs`; None: found here, which waits for the
                device. Their sizes are known on the host, so nothing else here waits.
            heads: which of the model's heads to compute, for inference; of the others nothing comes back. The
                dense vector always does.
        """
        found, has_lexical = None, "lexical" in heads
        if has_lexical and self.lexical_head is not None and pair_T is None:
            # before the encoder: nothing is queued yet that the wait would be for
            texts = PackedTexts(
                input_ids_T=input_ids_T,
                position_ids_T=position_ids_T,
                cu_seqlens_N1=cu_seqlens_N1,
                lengths=lengths,
            )
            found = texts.with_pairs(self.special_ids).lexical
        if found is not None:
            pair_T, ids_Z, lexical_offsets_N1 = found.pair_T, found.ids_Z, found.offsets_N1
        stream = insert_cls(
            input_ids_T, position_ids_T, cu_seqlens_N1, lengths, reading=self.reading, cls_id=self.first_id
        )
        all_hidden_TD = encode_packed(
            self.encoder, stream.input_ids_T, stream.position_ids_T, stream.cu_seqlens_N1, stream.lengths
        )
        hidden_TD = own_rows(all_hidden_TD, stream)
        none_N1 = cu_seqlens_N1.new_zeros(len(lengths) + 1, dtype=torch.int64)
        if has_lexical and self.lexical_head is not None and pair_T is not None and ids_Z is not None:
            logits_T = self.lexical_head(hidden_TD).squeeze(-1)
            weights_Z = lexical_weights(logits_T, pair_T, ids_Z.shape[0])
        elif has_lexical and self.expansion_head is not None:
            weights_Z, ids_Z, lexical_offsets_N1 = self._expand(hidden_TD, lengths)
        else:
            weights_Z, ids_Z = hidden_TD.new_zeros(0), input_ids_T.new_zeros(0)
            lexical_offsets_N1 = none_N1
        multi_KC, multi_offsets_N1 = hidden_TD.new_zeros(0, hidden_TD.shape[1]), none_N1
        if "multi_vector" in heads and self.multi_vector_head is not None:
            multi_KC, multi_offsets_N1 = self._rows(self.multi_vector_head(hidden_TD), cu_seqlens_N1)
        # every other head reads it, and it has no weights: it costs one row a text even where nobody asks
        dense_ND = normalize_rows(pool_stream(all_hidden_TD, stream, self.reading))
        assert lexical_offsets_N1 is not None
        return dense_ND, weights_Z, ids_Z, lexical_offsets_N1, multi_KC, multi_offsets_N1

    def _rows(self, projected_TC: Tensor, cu_seqlens_N1: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised rows of the multi-vector head, and each text's share of them."""
        if self.first_id is None:
            multi_KC, offsets_N1 = normalize_rows(projected_TC), cu_seqlens_N1.long()
        else:
            multi_KC, offsets_N1 = multi_vector_rows(projected_TC, cu_seqlens_N1)
        if self.training and multi_KC.dtype is torch.float16:
            # the loss gives their gradient before it is scaled: in fp16 it would vanish
            multi_KC = multi_KC.float()
        return multi_KC, offsets_N1

    def _expand(self, hidden_TD: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, ids and offsets of the expansion head; pruned outside training only, because a pair that
        is cut off has no gradient by which it could come back."""
        assert self.expansion_head is not None
        rows_TD, bias_V = self.expansion_head(hidden_TD)
        embeddings = self.encoder.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        top_k = None if self.training else self.expansion_top_k
        pairs = expand(rows_TD, embeddings.weight, bias_V, lengths, self.special_ids, top_k=top_k)
        return pairs.weights_Z, pairs.ids_Z, pairs.offsets_N1


@torch.no_grad()
def init_heads(model: M3Model, lexical_init_bias: float) -> None:
    """Start both heads so that they rank before the first step.

    Lexical: weight 0 and a positive bias, so every token is alive with equal weight (counting shared ids).
    Multi-vector: the identity, or what comes nearest to it (see `init_linear` and `init_projection`).
    """
    if model.lexical_head is not None:
        model.lexical_head.weight.zero_()
        model.lexical_head.bias.fill_(lexical_init_bias)
    head = model.multi_vector_head
    if isinstance(head, Projection):
        init_projection(head)
    elif head is not None:
        init_linear(head)


def max_model_tokens(model: M3Model) -> int:
    """Longest text the model has positions for, with the tokens its reading puts in."""
    return model.reading.usable_tokens(max_text_tokens(model.encoder.config))


def is_head_parameter(name: str) -> bool:
    """Whether the parameter of this name (in an M3Model) belongs to a head."""
    return name.startswith(HEAD_PREFIXES)


def encoder_shape(model: M3Model) -> EncoderShape:
    """The sizes that decide the model's arithmetic."""
    rows = model.multi_vector_head
    config = model.encoder.config
    sizes = {**config.to_dict(), "model_type": config.model_type}
    if rows is None:
        return read_shape(sizes)
    weights = rows.num_weights if isinstance(rows, Projection) else None
    return read_shape(sizes, multi_vector_dim=rows.out_features, multi_vector_weights=weights)


def represent(
    forward: Callable[..., tuple[Tensor, ...]], texts: PackedTexts, heads: Collection[str] | None = None
) -> Representations:
    """One forward pass over `texts`; `forward` is an M3Model, or the call of the engine around one; `heads`:
    which to compute (None: all)."""
    pairs = texts.lexical
    given = () if pairs is None else (pairs.pair_T, pairs.ids_Z, pairs.offsets_N1)
    options = {} if heads is None else {"heads": tuple(heads)}
    dense_ND, weights_Z, ids_Z, lexical_offsets_N1, multi_KC, multi_offsets_N1 = forward(
        texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths, *given, **options
    )
    # () has the offsets read: only where the model had to find the pairs itself
    pair_counts = () if pairs is None else pairs.counts
    if not ids_Z.shape[0]:
        pair_counts = (0,) * texts.num_texts
    # a model whose texts begin with a token of their own has a row for it too
    first_row = 0 if multi_KC.shape[0] == texts.num_tokens else 1
    return Representations(
        dense_ND=dense_ND,
        lexical_weights_Z=weights_Z,
        lexical_ids_Z=ids_Z,
        lexical_offsets_N1=lexical_offsets_N1,
        multi_KC=multi_KC,
        multi_offsets_N1=multi_offsets_N1,
        pair_counts=pair_counts,
        row_counts=tuple(length - first_row if multi_KC.shape[0] else 0 for length in texts.lengths),
    )
