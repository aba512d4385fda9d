"""The M3 model: one encoder, three heads, one forward pass over a packed stream.

State-dict keys: `encoder.*` (the Hugging Face encoder's own keys), `lexical_head.{weight,bias}`, `multi_vector_head.{weight,bias}`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megam3.batch import PackedTexts, Representations
from megam3.model.backbone import encode_packed
from megam3.model.heads import dense_vectors, lexical_structure, lexical_weights, multi_vector_rows

HEAD_PREFIXES = ("lexical_head.", "multi_vector_head.")
"""Parameters whose names start with one of these belong to the heads; they may have a learning rate of their own."""


class M3Model(nn.Module):
    """Encoder with a lexical head (D → 1) and a multi-vector head (D → C). The dense head has no weights.

    Args:
        encoder: an encoder set to packed attention (`load_backbone`).
        special_ids: ids that weigh nothing lexically: `<s>`, `</s>`, `<pad>`, `<unk>`.
        multi_vector_dim: C; None: the encoder's hidden size.
        lexical_init_bias: see `init_heads`.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        special_ids: Iterable[int],
        *,
        multi_vector_dim: int | None = None,
        lexical_init_bias: float = 0.3,
    ):
        super().__init__()
        hidden_size = encoder.config.hidden_size
        self.encoder = encoder
        self.special_ids = tuple(sorted(set(special_ids)))
        self.lexical_head = nn.Linear(hidden_size, 1)
        self.multi_vector_head = nn.Linear(hidden_size, multi_vector_dim or hidden_size)
        init_heads(self, lexical_init_bias)

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, cu_seqlens_N1: Tensor, lengths: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """The fields of Representations, in order, as a plain tuple (ZeRO-3's hooks find tensors in tuples, lists and dicts only)."""
        num_texts, num_tokens = len(lengths), input_ids_T.shape[0]
        lengths_N = (cu_seqlens_N1[1:] - cu_seqlens_N1[:-1]).long()
        text_ids_T = torch.repeat_interleave(
            torch.arange(num_texts, device=input_ids_T.device), lengths_N, output_size=num_tokens
        )
        # before the encoder: this waits for the device, and now there is nothing queued to wait for
        structure = lexical_structure(input_ids_T, text_ids_T, num_texts, self.special_ids)
        hidden_TD = encode_packed(self.encoder, input_ids_T, position_ids_T, cu_seqlens_N1, lengths)
        weights_Z = lexical_weights(self.lexical_head(hidden_TD).squeeze(-1), structure)
        multi_KC, multi_offsets_N1 = multi_vector_rows(
            self.multi_vector_head(hidden_TD), text_ids_T, cu_seqlens_N1
        )
        dense_ND = dense_vectors(hidden_TD, cu_seqlens_N1)
        return dense_ND, weights_Z, structure.ids_Z, structure.offsets_N1, multi_KC, multi_offsets_N1


@torch.no_grad()
def init_heads(model: M3Model, lexical_init_bias: float) -> None:
    """Start both heads so that they rank before the first step.

    Lexical: weight 0 and a positive bias, so every token is alive with equal weight (counting shared ids). Multi-vector: the identity, or,
    when C differs from D, rows (columns) orthonormal from a fixed seed, which keeps angles as well as C dimensions can.
    """
    model.lexical_head.weight.zero_()
    model.lexical_head.bias.fill_(lexical_init_bias)
    weight_CD = model.multi_vector_head.weight
    if weight_CD.shape[0] == weight_CD.shape[1]:
        nn.init.eye_(weight_CD)
    else:
        nn.init.orthogonal_(weight_CD, generator=torch.Generator(weight_CD.device).manual_seed(0))
    model.multi_vector_head.bias.zero_()


def is_head_parameter(name: str) -> bool:
    """Whether the parameter of this name (in an M3Model) belongs to a head."""
    return name.startswith(HEAD_PREFIXES)


def represent(module: Callable[..., tuple[Tensor, ...]], texts: PackedTexts) -> Representations:
    """One forward pass of `module` (an M3Model, or an engine around one) over `texts`."""
    return Representations(
        *module(texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths)
    )
