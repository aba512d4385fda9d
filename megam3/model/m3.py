"""The M3 model: one encoder, three heads, one forward pass over a packed stream.

State-dict keys: `encoder.*` (the Hugging Face encoder's own keys), `lexical_head.{weight,bias}`,
`multi_vector_head.{weight,bias}`.
"""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megam3.batch import PackedTexts, Representations
from megam3.config.objective import HEADS
from megam3.encoders import EncoderShape
from megam3.model.backbone import encode_packed
from megam3.model.heads import dense_vectors, lexical_structure, lexical_weights, multi_vector_rows

HEAD_PREFIXES = ("lexical_head.", "multi_vector_head.")
"""Parameters whose names start with one of these belong to the heads; they may have a learning rate of their
own."""


class M3Model(nn.Module):
    """Encoder with a lexical head (D → 1) and a multi-vector head (D → C). The dense head has no weights.

    Args:
        encoder: an encoder set to packed attention (`load_backbone`).
        special_ids: ids that weigh nothing lexically: `<s>`, `</s>`, `<pad>`, `<unk>`.
        multi_vector_dim: C; None: the encoder's hidden size.
        lexical_init_bias: see `init_heads`.
        heads: which heads exist; the others have no weights, and the representations hold nothing of them.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        special_ids: Iterable[int],
        *,
        multi_vector_dim: int | None = None,
        lexical_init_bias: float = 0.3,
        heads: Collection[str] = HEADS,
    ):
        super().__init__()
        hidden_size = encoder.config.hidden_size
        self.encoder = encoder
        self.special_ids = tuple(sorted(set(special_ids)))
        self.heads = tuple(name for name in HEADS if name in heads)
        self.lexical_head = nn.Linear(hidden_size, 1) if "lexical" in heads else None
        has_rows = "multi_vector" in heads
        self.multi_vector_head = nn.Linear(hidden_size, multi_vector_dim or hidden_size) if has_rows else None
        init_heads(self, lexical_init_bias)

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, cu_seqlens_N1: Tensor, lengths: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """The fields of Representations, in order, as a plain tuple (ZeRO-3's hooks find tensors in tuples,
        lists and dicts only)."""
        num_texts, num_tokens = len(lengths), input_ids_T.shape[0]
        device = input_ids_T.device
        lengths_N = (cu_seqlens_N1[1:] - cu_seqlens_N1[:-1]).long()
        text_ids_T = torch.arange(num_texts, device=device).repeat_interleave(
            lengths_N, output_size=num_tokens
        )
        structure = None
        if self.lexical_head is not None:
            # before the encoder: this waits for the device, and now there is nothing queued to wait for
            structure = lexical_structure(input_ids_T, text_ids_T, num_texts, self.special_ids)
        hidden_TD = encode_packed(self.encoder, input_ids_T, position_ids_T, cu_seqlens_N1, lengths)
        none_N1 = torch.zeros(num_texts + 1, dtype=torch.int64, device=device)
        weights_Z, ids_Z, lexical_offsets_N1 = hidden_TD.new_zeros(0), input_ids_T.new_zeros(0), none_N1
        if structure is not None and self.lexical_head is not None:
            weights_Z = lexical_weights(self.lexical_head(hidden_TD).squeeze(-1), structure)
            ids_Z, lexical_offsets_N1 = structure.ids_Z, structure.offsets_N1
        multi_KC, multi_offsets_N1 = hidden_TD.new_zeros(0, hidden_TD.shape[1]), none_N1
        if self.multi_vector_head is not None:
            projected_TC = self.multi_vector_head(hidden_TD)
            multi_KC, multi_offsets_N1 = multi_vector_rows(projected_TC, text_ids_T, cu_seqlens_N1)
        # every other head reads it, and it has no weights: it costs one row a text even where nobody asks
        dense_ND = dense_vectors(hidden_TD, cu_seqlens_N1)
        return dense_ND, weights_Z, ids_Z, lexical_offsets_N1, multi_KC, multi_offsets_N1


@torch.no_grad()
def init_heads(model: M3Model, lexical_init_bias: float) -> None:
    """Start both heads so that they rank before the first step.

    Lexical: weight 0 and a positive bias, so every token is alive with equal weight (counting shared ids).
    Multi-vector: the identity, or, when C differs from D, rows (columns) orthonormal from a fixed seed, which
    keeps angles as well as C dimensions can.
    """
    if model.lexical_head is not None:
        model.lexical_head.weight.zero_()
        model.lexical_head.bias.fill_(lexical_init_bias)
    if model.multi_vector_head is not None:
        weight_CD = model.multi_vector_head.weight
        if weight_CD.shape[0] == weight_CD.shape[1]:
            nn.init.eye_(weight_CD)
        else:
            nn.init.orthogonal_(weight_CD, generator=torch.Generator(weight_CD.device).manual_seed(0))
        model.multi_vector_head.bias.zero_()


def is_head_parameter(name: str) -> bool:
    """Whether the parameter of this name (in an M3Model) belongs to a head."""
    return name.startswith(HEAD_PREFIXES)


def encoder_shape(model: M3Model) -> EncoderShape:
    """The sizes that decide the model's arithmetic."""
    config, rows = model.encoder.config, model.multi_vector_head
    return EncoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        multi_vector_dim=0 if rows is None else rows.out_features,
    )


def represent(forward: Callable[..., tuple[Tensor, ...]], texts: PackedTexts) -> Representations:
    """One forward pass over `texts`; `forward` is an M3Model, or the call of the engine around one."""
    dense_ND, weights_Z, ids_Z, lexical_offsets_N1, multi_KC, multi_offsets_N1 = forward(
        texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths
    )
    return Representations(
        dense_ND=dense_ND,
        lexical_weights_Z=weights_Z,
        lexical_ids_Z=ids_Z,
        lexical_offsets_N1=lexical_offsets_N1,
        multi_KC=multi_KC,
        multi_offsets_N1=multi_offsets_N1,
    )
