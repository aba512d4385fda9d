"""The packed RetroMAE against a naive model with L x L masks and whole logits, in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy, gelu
from transformers import BertConfig, ModernBertConfig

from megam3.errors import ConfigError
from megam3.model.backbone import build_backbone, encode_packed
from megam3.model.masking import order_in_halves
from megam3.model.retromae import RetroMAE, half_lengths, key_order
from megam3.packed_texts import pack_stream

LENGTHS = (9, 2, 14, 9)


def make_model() -> RetroMAE:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    return RetroMAE(build_backbone(config), has_decoder=True).double().eval()


def naive_loss(model, ids_T, masked_T, hidden, orders, mask_share, scales):
    """Text by text, with a visibility matrix written out by the rule of the paper's figure."""
    decoder, losses, start = model.decoder, [0.0, 0.0], 0
    weight = model.encoder.get_input_embeddings().weight

    def told(rows, targets):
        rows, bias = model.lm_head(rows)
        return cross_entropy(rows @ weight.T + bias, targets, reduction="sum")

    for length, order in zip(LENGTHS, orders):
        ids, masked = ids_T[start : start + length], masked_T[start : start + length]
        texts = pack_stream(masked, (length,))
        h = encode_packed(model.encoder, masked, texts.position_ids_T, texts.cu_seqlens_N1, (length,))
        here = [i - start for i in hidden if start <= i < start + length]
        losses[0] = losses[0] + told(h[here], ids[here])
        memory = model.encoder.embeddings(input_ids=ids[None])[0]
        memory = torch.cat([h[:1], memory[1:]])
        query = h[0] + model.encoder.embeddings.position_embeddings.weight[:length]
        others = order[1:]
        cut = (len(others) + 1) // 2
        visible = torch.zeros(length, length, dtype=torch.bool)
        visible[:, 0] = True
        share = round((1 - mask_share) * len(others))
        for own, other in ((others[:cut], others[cut:]), (others[cut:], others[:cut])):
            for row in own:
                visible[row, other[:share]] = True
        assert not visible.diagonal()[1:].any()
        q, k, v = (
            linear(x).unflatten(1, (2, 8)).transpose(0, 1)
            for linear, x in ((decoder.query, query), (decoder.key, memory), (decoder.value, memory))
        )
        scores = (q @ k.mT / 8**0.5).masked_fill(~visible, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = decoder.attention_norm(query + decoder.output(out))
        x = decoder.output_norm(x + decoder.narrow(gelu(decoder.widen(x))))
        kept = [i for i in range(1, length) if ids[i] >= 5]
        losses[1] = losses[1] + told(x[kept], ids[kept])
        start += length
    return losses[0] * scales[0] + losses[1] * scales[1]


@pytest.mark.parametrize("mask_share", [0.5, 0.7])
def test_loss_and_all_gradients_equal_the_naive_model(mask_share):
    model = make_model()
    generator = torch.Generator().manual_seed(1)
    texts = pack_stream(torch.randint(3, 50, (sum(LENGTHS),), generator=generator), LENGTHS)
    ids, masked = texts.input_ids_T, texts.input_ids_T.clone()
    hidden = torch.tensor([2, 5, 10, 13, 20, 30])
    masked[hidden] = 4
    order = order_in_halves(texts.text_ids_T(), texts.text_ids_T(), texts.position_ids_T, seed=0, step=0)
    scales = (0.3, 0.2, 0.0)
    decoded = (ids >= 5) & (texts.position_ids_T > 0)
    stream = (ids, masked, texts.position_ids_T, texts.cu_seqlens_N1, LENGTHS)
    loss, encoder, decoder, _ = model(
        *stream, hidden, order, decoded, int(decoded.sum()), None, mask_share, scales
    )
    torch.testing.assert_close(loss.item(), (0.3 * encoder + 0.2 * decoder).item(), rtol=1e-12, atol=0)
    loss.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    starts = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    orders = [(o - s).tolist() for o, s in zip(order.split(LENGTHS), starts)]
    expected = naive_loss(model, ids, masked, hidden.tolist(), orders, mask_share, scales)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fast[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_rows_and_keys_of_a_text_by_hand():
    # s | d a e | c b, as in the module's docstring
    order = torch.tensor([0, 4, 1, 5, 3, 2])
    rows, keys = half_lengths((6,), 0.5)
    assert (rows, keys) == ([3, 2], [3, 3])
    assert key_order(order, (6,), rows, keys).tolist() == [0, 3, 2, 0, 4, 1]


def seen_columns(order: list[int], rows: list[int], keys: list[int], key_K: list[int]) -> dict[int, set[int]]:
    """Columns that each row of one text reads, by a walk over what the decoder is given."""
    seen, first_row, first_key = {}, 1, 0
    for num_rows, num_keys in zip(rows, keys):
        for row in order[first_row : first_row + num_rows]:
            seen[row] = set(key_K[first_key : first_key + num_keys])
        first_row, first_key = first_row + num_rows, first_key + num_keys
    return seen


def test_a_row_of_the_decoder_reads_s_and_half_of_the_others_at_random_and_never_itself():
    length, draws = 21, 400
    counts = torch.zeros(length, length)
    texts = pack_stream(torch.zeros(length, dtype=torch.int64), (length,))
    rows, keys = half_lengths((length,), 0.5)
    for step in range(draws):
        order = order_in_halves(
            texts.text_ids_T(), texts.text_ids_T(), texts.position_ids_T, seed=0, step=step
        )
        key_K = key_order(order, (length,), rows, keys)
        for row, columns in seen_columns(order.tolist(), rows, keys, key_K.tolist()).items():
            assert row not in columns
            assert len(columns) == 11
            counts[row, list(columns)] += 1
    assert counts[1:, 0].tolist() == [draws] * (length - 1)
    others = counts[1:, 1:][~torch.eye(length - 1, dtype=torch.bool)]
    # 10 of the 19 other columns; five standard deviations of a binomial of 400 draws
    assert (others - draws * 10 / 19).abs().max() < 5 * (draws * 10 / 19 * 9 / 19) ** 0.5


def test_nothing_caps_what_the_decoder_hides_at_512():
    rows, keys = half_lengths((8192,), 0.5)
    assert (sum(rows), rows, keys) == (8191, [4096, 4095], [4096, 4097])


def test_an_encoder_without_learned_positions_is_refused_by_name():
    config = ModernBertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    with pytest.raises(ConfigError, match="modernbert encoder does not have; set objective.decoder: false"):
        RetroMAE(build_backbone(config), has_decoder=True)
