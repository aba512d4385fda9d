"""RetroMAE as the papers draw it: padded texts, dense [N, L, L] masks, whole logits, loops; for comparison.

Shares the weights of a `megam3.model.retromae.RetroMAE` and none of its code: the encoder is the stock
transformers class, padded, with its own eager attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu

from megam3.model.retromae import RetroMAE


@dataclass(frozen=True, kw_only=True)
class NaiveText:
    """One text, and what is hidden of it."""

    ids: list[int]
    masked: list[int]
    """What the encoder reads."""
    hidden: list[int]
    """Positions the encoder must tell."""
    order: list[int]
    """Positions, `<s>` first, then the first half, then the second."""
    ordinary: list[bool]
    """Whether the id at this position is no special token."""


@dataclass(frozen=True, kw_only=True)
class NaiveLosses:
    """Sums over texts, and what they are divided by."""

    encoder: Tensor
    decoder: Tensor
    bags: Tensor
    num_encoder: int
    num_decoder: int
    num_bags: int

    def total(self, decoder_weight: float, bag_weight: float) -> Tensor:
        """The loss of a step that consists of these texts."""
        encoder, decoder = self.encoder / self.num_encoder, self.decoder / max(1, self.num_decoder)
        return encoder + decoder_weight * decoder + bag_weight * self.bags / max(1, self.num_bags)


def visibility(order: Sequence[int], length: int, mask_share: float) -> Tensor:
    """[L, L] bool: row i may read column j; row 0 (`<s>`) is no row of the decoder and reads itself."""
    others = list(order[1:])
    cut = (len(others) + 1) // 2
    visible = torch.zeros(length, length, dtype=torch.bool)
    visible[:, 0] = True
    share = round((1 - mask_share) * len(others))
    for own, other in ((others[:cut], others[cut:]), (others[cut:], others[:cut])):
        for row in own:
            for column in other[:share]:
                visible[row, column] = True
    return visible


def naive_losses(model: RetroMAE, texts: Sequence[NaiveText], mask_share: float) -> NaiveLosses:
    """Losses of `texts` with a graph to the model's parameters."""
    longest, pad = max(len(text.ids) for text in texts), model.encoder.config.pad_token_id
    ids, masked = (
        torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        for rows in ([text.ids for text in texts], [text.masked for text in texts])
    )
    real = torch.tensor([[i < len(text.ids) for i in range(longest)] for text in texts])
    hidden = _padded_encoder(model, masked, real)
    weight = model.encoder.get_input_embeddings().weight
    rows, bias = model.lm_head(hidden)
    logits = rows @ weight.T + bias
    zero = logits.new_zeros(())
    encoder, bags, num_bags = zero, zero, 0
    for n, text in enumerate(texts):
        for i in text.hidden:
            encoder = encoder + cross_entropy(logits[n, i], ids[n, i])
        bag = {token for token, is_word in zip(text.ids, text.ordinary) if is_word}
        if bag:
            pooled = logits[n, 1 : len(text.ids)].amax(0)
            bags = bags - sum(pooled.log_softmax(0)[token] for token in bag) / len(bag)
            num_bags += 1
    decoder, num_decoder = zero, 0
    if model.decoder is not None:
        decoded, bias = model.lm_head(_padded_decoder(model, texts, ids, hidden, mask_share))
        logits = decoded @ weight.T + bias
        for n, text in enumerate(texts):
            for i in range(1, len(text.ids)):
                if text.ordinary[i]:
                    decoder, num_decoder = decoder + cross_entropy(logits[n, i], ids[n, i]), num_decoder + 1
    return NaiveLosses(
        encoder=encoder,
        decoder=decoder,
        bags=bags,
        num_encoder=sum(len(text.hidden) for text in texts),
        num_decoder=num_decoder,
        num_bags=num_bags,
    )


def _padded_encoder(model: RetroMAE, ids_NL: Tensor, real_NL: Tensor) -> Tensor:
    config = type(model.encoder.config)(**model.encoder.config.to_dict())
    config._attn_implementation = "eager"
    stock = type(model.encoder)(config, add_pooling_layer=False).to(next(model.parameters()).dtype)
    stock.train(model.training)
    given = {"input_ids": ids_NL, "attention_mask": real_NL.long()}
    return functional_call(stock, dict(model.encoder.named_parameters()), (), given).last_hidden_state


def _padded_decoder(
    model: RetroMAE, texts: Sequence[NaiveText], ids_NL: Tensor, hidden_NLD: Tensor, mask_share: float
) -> Tensor:
    decoder, embeddings, longest = model.decoder, model.encoder.embeddings, ids_NL.shape[1]
    # every padded row and column reads, and is read by, itself alone: a row without columns would be NaN
    visible = torch.eye(longest, dtype=torch.bool).repeat(len(texts), 1, 1)
    for n, text in enumerate(texts):
        length = len(text.ids)
        visible[n, :length, :length] = visibility(text.order, length, mask_share)
    offset = embeddings.position_embeddings.weight.shape[0] - model.encoder.config.max_position_embeddings
    offset += model.encoder.config.pad_token_id + 1 if model.encoder.config.model_type == "xlm-roberta" else 0
    positions = torch.arange(longest) + offset
    embedded = embeddings(input_ids=ids_NL, position_ids=positions.expand_as(ids_NL))
    memory = torch.cat([hidden_NLD[:, :1], embedded[:, 1:]], 1)
    query = hidden_NLD[:, :1] + embeddings.position_embeddings.weight[positions]
    q, k, v = (
        linear(x).unflatten(-1, (decoder.num_heads, -1)).transpose(1, 2)
        for linear, x in ((decoder.query, query), (decoder.key, memory), (decoder.value, memory))
    )
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible.unsqueeze(1), -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = decoder.attention_norm(query + decoder.output(out))
    return decoder.output_norm(x + decoder.narrow(gelu(decoder.widen(x))))
