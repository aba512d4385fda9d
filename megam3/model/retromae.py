"""RetroMAE (arXiv 2205.12035): an encoder that reads masked text, and a one-layer decoder that must rebuild
the text from `<s>`.

Enhanced decoding: row i asks with h_<s> + position i, and reads `<s>` and a sampled part of the other tokens,
never itself. Here the tokens of a text (all but `<s>`) are shuffled into two halves; rows of one half read
the other half and `<s>`:

    text   s a b c d e   shuffled  s | d a e | c b        rows d a e  read  s c b
                                                          rows c b    read  s d a      (2 of the 5, as
                                                          decoder_mask_share says)

So a row's own column never exists: no mask is built, and the attention is two varlen texts of about L/2 rows
and L/2 keys. The paper draws each row's columns independently; here the rows of one half share theirs. Each
row still reads a uniformly drawn subset of the wanted share that leaves it out, anew every step.
"""

from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from megam3.config.schema import ModelConfig
from megam3.dist import comm
from megam3.errors import ConfigError
from megam3.model.backbone import encode_packed, first_position, load_backbone
from megam3.model.bag_of_words import bag_of_words_loss
from megam3.model.cross_attention import cross_attention
from megam3.model.masked_lm import MaskedLMHead, fill_lm_head, tied_cross_entropy
from megam3.model.rows import select_unique_rows


def half_lengths(lengths: tuple[int, ...], mask_share: float) -> tuple[list[int], list[int]]:
    """Rows and keys of the two halves of each text, from its length alone: the host needs no answer of the
    device.

    >>> half_lengths((6,), 0.5)     # 5 tokens beside <s>: halves of 3 and 2; keys include <s>
    ([3, 2], [3, 3])
    """
    rows: list[int] = []
    keys: list[int] = []
    for length in lengths:
        others = length - 1
        halves = (others - others // 2, others // 2)
        visible = round((1 - mask_share) * others)
        rows += halves
        keys += [1 + min(visible, halves[1]), 1 + min(visible, halves[0])]
    return rows, keys


def key_order(order_T: Tensor, lengths: tuple[int, ...], rows: list[int], keys: list[int]) -> Tensor:
    """Stream index of every key, half after half; `order_T` holds each text as `<s>`, first half, second
    half."""
    text_starts = [end - length for end, length in zip(accumulate(lengths), lengths)]
    # of each half: where its text starts, where what it reads starts, its keys, and the keys before its own
    texts = [start for start in text_starts for _ in range(2)]
    # rows of the first half read the second, which starts after <s> and the first half
    starts = [at for start, first_half in zip(text_starts, rows[0::2]) for at in (start + first_half, start)]
    before = [end - count for end, count in zip(accumulate(keys), keys)]
    host_4S = torch.tensor([texts, starts, keys, before], dtype=torch.int64)
    texts_S, starts_S, keys_S, before_S = comm.copy_pinned(host_4S, order_T.device)
    half_K = torch.repeat_interleave(keys_S, output_size=sum(keys))
    local_K = torch.arange(sum(keys), device=order_T.device) - before_S[half_K]
    return order_T[torch.where(local_K == 0, texts_S[half_K], starts_S[half_K] + local_K)]


def rest_of_texts(cu_seqlens_N1: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Stream index of every token but `<s>`, ascending, and the text it belongs to.

    Their number follows from the lengths: to pick them by a flag a token would wait for the device.
    """
    others_N = (cu_seqlens_N1[1:] - cu_seqlens_N1[:-1]).long() - 1
    num_others = sum(lengths) - len(lengths)
    text_R = torch.repeat_interleave(others_N, output_size=num_others)
    # every text from the first to this one has left its <s> out
    return torch.arange(num_others, device=text_R.device) + text_R + 1, text_R


class EnhancedDecoder(nn.Module):
    """One transformer layer (post-norm, as BERT's) whose queries and keys are different streams."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, layer_norm_eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.widen = nn.Linear(hidden_size, intermediate_size)
        self.narrow = nn.Linear(intermediate_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(
        self, query_RD: Tensor, memory_TD: Tensor, key_K: Tensor, rows: list[int], keys: list[int]
    ) -> Tensor:
        """[R, D]; rows and keys are lengths of the halves, `key_K` the stream index of each key."""
        heads = (self.num_heads, -1)
        query_RHd = self.query(query_RD).unflatten(1, heads)
        # projected once per token, then picked: a token is a key of one half only (`<s>` of both)
        key_KHd = self.key(memory_TD).unflatten(1, heads).index_select(0, key_K)
        value_KHd = self.value(memory_TD).unflatten(1, heads).index_select(0, key_K)
        attended = cross_attention(query_RHd, key_KHd, value_KHd, rows, keys).flatten(1)
        hidden_RD = self.attention_norm(query_RD + self.output(attended))
        return self.output_norm(hidden_RD + self.narrow(gelu(self.widen(hidden_RD))))


class RetroMAE(nn.Module):
    """Encoder, masked-LM head, and the decoder unless `has_decoder` is false (plain masked LM)."""

    def __init__(self, encoder: PreTrainedModel, *, has_decoder: bool):
        super().__init__()
        config = encoder.config
        if has_decoder and not hasattr(getattr(encoder, "embeddings", None), "position_embeddings"):
            raise ConfigError(
                "objective.decoder",
                True,
                f"reads learned positions, which a {config.model_type} encoder does not have",
                "set objective.decoder: false (plain masked LM)",
            )
        # xlm-roberta calls it layer_norm_eps, ModernBERT norm_eps
        eps = getattr(config, "layer_norm_eps", getattr(config, "norm_eps", 1e-5))
        self.encoder = encoder
        self.lm_head = MaskedLMHead(config.hidden_size, config.vocab_size, eps)
        self.decoder = None
        if has_decoder:
            self.decoder = EnhancedDecoder(
                config.hidden_size, config.num_attention_heads, config.intermediate_size, eps
            )

    def forward(
        self,
        input_ids_T: Tensor,
        masked_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens_N1: Tensor,
        lengths: tuple[int, ...],
        hidden_M: Tensor,
        order_T: Tensor,
        decoded_T: Tensor,
        num_decoded: int,
        bag_2Z: Tensor | None,
        mask_share: float,
        scales: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, and the summed cross-entropies of encoder, decoder and bags of words without a graph.

        Args:
            hidden_M: stream positions that the encoder must tell.
            order_T: see `key_order`; decoded_T: bool, tokens the decoder must tell, `num_decoded` of them:
                the host asks the device for no size.
            bag_2Z: text and id of each distinct ordinary id; None: no bag-of-words term.
            scales: factor of each summed cross-entropy of the encoder, of the decoder, of the bags.
        """
        hidden_TD = encode_packed(self.encoder, masked_ids_T, position_ids_T, cu_seqlens_N1, lengths)
        rows, targets = [hidden_TD.index_select(0, hidden_M)], [input_ids_T[hidden_M]]
        if self.decoder is not None:
            decoded_RD, index_R = self._decode(
                hidden_TD, input_ids_T, position_ids_T, cu_seqlens_N1, lengths, order_T, mask_share
            )
            kept_M = torch.nonzero_static(decoded_T[index_R], size=num_decoded).squeeze(1)
            rows.append(decoded_RD.index_select(0, kept_M))
            targets.append(input_ids_T[index_R[kept_M]])
        scale_M = torch.cat(
            [
                torch.full((len(t),), scale, dtype=torch.float64, device=t.device)
                for t, scale in zip(targets, scales)
            ]
        )
        rows_MD, bias_V = self.lm_head(torch.cat(rows))
        weight_VD = cast(nn.Embedding, self.encoder.get_input_embeddings()).weight
        loss, losses_M = tied_cross_entropy(rows_MD, weight_VD, bias_V, torch.cat(targets), scale_M)
        bag_sum = losses_M.new_zeros(())
        if bag_2Z is not None:
            # every token but <s>, whose vector has its own task in the decoder
            rest_R, _ = rest_of_texts(cu_seqlens_N1, lengths)
            rows_TD, bias_V = self.lm_head(select_unique_rows(hidden_TD, rest_R))
            pooled = [length - 1 for length in lengths]
            text_Z, id_Z = bag_2Z
            bag, bags_N = bag_of_words_loss(rows_TD, weight_VD, bias_V, pooled, text_Z, id_Z, scales[2])
            loss, bag_sum = loss + bag, bags_N.sum()
        return loss, losses_M[: len(targets[0])].sum(), losses_M[len(targets[0]) :].sum(), bag_sum

    def _decode(
        self,
        hidden_TD: Tensor,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens_N1: Tensor,
        lengths: tuple[int, ...],
        order_T: Tensor,
        mask_share: float,
    ) -> tuple[Tensor, Tensor]:
        """Decoder rows, and the stream position each of them stands for."""
        assert self.decoder is not None
        positions_T = position_ids_T + first_position(self.encoder.config)
        first_N = cu_seqlens_N1[:-1].long()
        embeddings = cast(nn.Module, self.encoder.embeddings)
        embedded = embeddings(input_ids=input_ids_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0))
        memory_TD = embedded.squeeze(0).index_copy(0, first_N, hidden_TD[first_N])
        # in every text the order begins with <s>, which is no row
        rest_R, text_R = rest_of_texts(cu_seqlens_N1, lengths)
        index_R = order_T[rest_R]
        position_rows = cast(nn.Embedding, embeddings.position_embeddings)
        query_RD = hidden_TD[first_N].index_select(0, text_R) + position_rows(positions_T[index_R])
        rows, keys = half_lengths(lengths, mask_share)
        key_K = key_order(order_T, lengths, rows, keys)
        return self.decoder(query_RD, memory_TD, key_K, rows, keys), index_R


def load_retromae(path: str, config: ModelConfig, *, has_decoder: bool, dtype: torch.dtype) -> RetroMAE:
    """The encoder in folder `path`, its published `lm_head` where the folder has one, and a fresh decoder.

    Raises:
        ConfigError, CheckpointError: see `load_backbone`; a decoder over an encoder without learned
        positions.
    """
    encoder = load_backbone(
        path,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        attention=config.attention,
        dtype=dtype,
    )
    model = RetroMAE(encoder, has_decoder=has_decoder)
    fill_lm_head(model.lm_head, Path(path))
    return model.to(dtype)
