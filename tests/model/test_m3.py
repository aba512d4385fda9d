"""The model as a whole: order of its outputs, independence from packing, initial heads, and how it is read
from a folder."""

import dataclasses

import pytest
import torch
from transformers import AutoModel

from megam3.batch import Representations, join_representations
from megam3.config.schema import ModelConfig
from megam3.encoders import LEXICAL_FILE, MULTI_VECTOR_FILE
from megam3.errors import CheckpointError
from megam3.model.backbone import build_backbone
from megam3.model.m3 import M3Model, is_head_parameter, represent
from megam3.model.pretrained import load_m3, read_special_ids
from megam3.packed_texts import pack_texts
from tests.factory import make_tiny_model_folder, random_token_ids, tiny_config, write_tiny_tokenizer

LENGTHS = (9, 3, 40, 9, 3, 2, 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"))


def load(folder, **fields):
    return load_m3(str(folder), ModelConfig(path=str(folder), **fields))


def test_every_head_equals_the_formulas_on_the_padded_encoder(folder):
    """Each text alone through transformers' own encoder, then the formulas of arXiv 2402.03216, section 3.2,
    written out."""
    model = load(folder).double().eval()
    encoder = AutoModel.from_pretrained(folder).double().eval()
    token_ids = random_token_ids(LENGTHS)
    got = represent(model, pack_texts(token_ids))
    for n, ids in enumerate(token_ids):
        hidden = encoder(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(got.dense_ND[n], hidden[0] / hidden[0].norm())
        rows = hidden[1:] @ model.multi_vector_head.weight.T + model.multi_vector_head.bias
        start, stop = got.multi_offsets_N1[n], got.multi_offsets_N1[n + 1]
        torch.testing.assert_close(got.multi_KC[start:stop], rows / rows.norm(dim=-1, keepdim=True))
        logits = (hidden @ model.lexical_head.weight.T + model.lexical_head.bias).squeeze(-1)
        wanted = {
            i: max(max(0.0, logits[t].item()) for t in range(len(ids)) if ids[t] == i)
            for i in sorted(set(ids) - {0, 1, 2, 3})
        }
        start, stop = got.lexical_offsets_N1[n], got.lexical_offsets_N1[n + 1]
        assert got.lexical_ids_Z[start:stop].tolist() == list(wanted)
        torch.testing.assert_close(
            got.lexical_weights_Z[start:stop], torch.tensor(list(wanted.values()), dtype=torch.float64)
        )


def test_forward_returns_a_plain_tuple_in_the_order_of_representations(folder):
    model = load(folder).eval()
    texts = pack_texts(random_token_ids(LENGTHS))
    outputs = model(texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths)
    assert type(outputs) is tuple
    named = represent(model, texts)
    # what follows stands on the host
    for field, output in zip(dataclasses.fields(Representations)[:6], outputs, strict=True):
        assert torch.equal(getattr(named, field.name), output)


def test_chunks_joined_equal_one_pass(folder):
    model = load(folder).double().eval()
    texts = pack_texts(random_token_ids(LENGTHS))
    whole = represent(model, texts)
    parts = [texts.select(0, 3), texts.select(3, 3), texts.select(3, 7)]
    joined = join_representations([represent(model, part) for part in parts])
    for field in dataclasses.fields(Representations):
        torch.testing.assert_close(getattr(joined, field.name), getattr(whole, field.name))


def test_an_empty_stream_reaches_every_parameter_with_zero(folder):
    model = load(folder).train()
    representations = represent(model, pack_texts([]))
    sum(tensor.sum() for tensor in representations.floats()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_heads_from_scratch_count_shared_tokens_and_keep_hidden_states():
    model = M3Model(build_backbone(tiny_config(100)), (0, 1, 2, 3), lexical_init_bias=0.4).eval()
    got = represent(model, pack_texts(random_token_ids(LENGTHS, vocab_size=100)))
    assert torch.equal(got.lexical_weights_Z, torch.full_like(got.lexical_weights_Z, 0.4))
    assert torch.equal(model.multi_vector_head.weight, torch.eye(32))
    assert not model.multi_vector_head.bias.any()


@pytest.mark.parametrize("width", [8, 48])
def test_a_head_of_another_width_starts_orthonormal_and_the_same_everywhere(width):
    first, second = (
        M3Model(build_backbone(tiny_config(100)), (0,), multi_vector_dim=width) for _ in range(2)
    )
    weight = first.multi_vector_head.weight
    assert weight.shape == (width, 32)
    gram = weight @ weight.T if width < 32 else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(width, 32)), rtol=0, atol=1e-5)
    assert torch.equal(weight, second.multi_vector_head.weight)


def test_state_dict_keys_are_the_encoders_own_plus_two_heads(folder):
    model = load(folder)
    names = set(model.state_dict())
    heads = {
        f"{head}.{part}" for head in ("lexical_head", "multi_vector_head") for part in ("weight", "bias")
    }
    assert names == heads | {f"encoder.{name}" for name in model.encoder.state_dict()}
    assert {name for name, _ in model.named_parameters() if is_head_parameter(name)} == heads


def test_heads_are_read_from_the_published_files(folder):
    model = load(folder)
    for file, head in ((LEXICAL_FILE, model.lexical_head), (MULTI_VECTOR_FILE, model.multi_vector_head)):
        saved = torch.load(folder / file, weights_only=True)
        assert torch.equal(head.weight, saved["weight"])
        assert torch.equal(head.bias, saved["bias"])


def test_special_ids_come_from_the_tokenizer(tmp_path):
    write_tiny_tokenizer(tmp_path)
    assert read_special_ids(str(tmp_path)) == (0, 1, 2, 3)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    """transformers alone would return a tokenizer of five tokens here."""
    tiny_config(100).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"holds no tokenizer \(none of tokenizer\.json.*put the encoder's tokenizer files there",
    ):
        read_special_ids(str(tmp_path))


def test_a_damaged_tokenizer_is_named(tmp_path):
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(
        CheckpointError, match="holds no readable tokenizer.*put the encoder's tokenizer files there"
    ):
        read_special_ids(str(tmp_path))


@pytest.mark.parametrize("file", [LEXICAL_FILE, MULTI_VECTOR_FILE])
def test_a_missing_head_is_an_error_or_starts_from_scratch(tmp_path, file):
    folder = make_tiny_model_folder(tmp_path)
    (folder / file).unlink()
    with pytest.raises(
        CheckpointError, match=rf"{file}.*head weights are missing; set model\.missing_heads: init"
    ):
        load(folder)
    model = load(folder, missing_heads="init")
    fresh = (
        (model.lexical_head.weight == 0).all()
        if file == LEXICAL_FILE
        else torch.equal(model.multi_vector_head.weight, torch.eye(32))
    )
    assert fresh
    other = model.multi_vector_head if file == LEXICAL_FILE else model.lexical_head
    assert other.bias.any(), "the head whose file is there must be read all the same"


def test_a_head_of_another_encoder_is_an_error(tmp_path):
    folder = make_tiny_model_folder(tmp_path)
    torch.save({"weight": torch.zeros(1, 64), "bias": torch.zeros(1)}, folder / LEXICAL_FILE)
    with pytest.raises(
        CheckpointError, match=r"sparse_linear\.pt.*weight has shape \(1, 64\), the model needs \(1, 32\)"
    ):
        load(folder)


def test_a_head_of_another_width_than_the_recipe_is_an_error(folder):
    with pytest.raises(
        CheckpointError,
        match=r"weight has shape \(32, 32\), the model needs \(16, 32\).*model\.multi_vector_dim",
    ):
        load(folder, multi_vector_dim=16)


def test_a_narrow_head_is_recognised_by_its_file(tmp_path):
    folder = make_tiny_model_folder(tmp_path, multi_vector_dim=12)
    assert load(folder).multi_vector_head.out_features == 12


@pytest.mark.parametrize(
    ("content", "rule"),
    [({"w": torch.zeros(1)}, r"must hold exactly weight and bias, not \['w'\]"), (None, "cannot be read")],
)
def test_a_damaged_head_file_is_named(tmp_path, content, rule):
    folder = make_tiny_model_folder(tmp_path)
    if content is None:
        (folder / LEXICAL_FILE).write_bytes(b"not a zip file")
    else:
        torch.save(content, folder / LEXICAL_FILE)
    with pytest.raises(CheckpointError, match=rf"sparse_linear\.pt.*{rule}"):
        load(folder)
