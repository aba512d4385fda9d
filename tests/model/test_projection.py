"""The multi-vector head of several layers: what it computes, where it starts, its gradients in float64."""

import json
import math

import pytest
import torch

from megam3.config.schema import ModelConfig
from megam3.errors import CheckpointError
from megam3.model.m3 import encoder_shape, is_head_parameter, represent
from megam3.model.pretrained import load_m3
from megam3.model.projection import Projection, init_projection
from megam3.packed_texts import pack_texts
from megam3.token_layers import TokenLayer, read_token_layers, residual_layers
from tests.factory import make_tiny_model_folder, random_token_ids

LENGTHS = (9, 4, 1, 17)
FUNCTIONS = {
    "identity": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def load(folder, **fields):
    return load_m3(str(folder), ModelConfig(path=str(folder), **fields))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"), multi_vector_dim=12)


def naive(state, layers, row):
    """One token through the chain, number by number."""
    for n, layer in enumerate(layers):
        weight, bias = state[f"{n}.linear.weight"].tolist(), state[f"{n}.linear.bias"].tolist()
        out = [
            FUNCTIONS[layer.activation](sum(w * x for w, x in zip(line, row)) + b)
            for line, b in zip(weight, bias)
        ]
        if layer.has_skip and f"{n}.residual.weight" in state:
            skip = [sum(w * x for w, x in zip(line, row)) for line in state[f"{n}.residual.weight"].tolist()]
            out = [a + b for a, b in zip(out, skip)]
        elif layer.has_skip:
            out = [a + b for a, b in zip(out, row)]
        row = out
    return row


@pytest.mark.parametrize("activation", sorted(FUNCTIONS))
@pytest.mark.parametrize("inner", [4, 6, 9])
def test_a_token_is_what_a_naive_loop_makes_of_it(activation, inner):
    torch.manual_seed(3)
    layers = residual_layers(6, inner, 5, activation)
    projection = Projection(layers).double()
    rows_TD = torch.randn(7, 6, dtype=torch.float64)
    expected = torch.tensor([naive(projection.state_dict(), layers, row.tolist()) for row in rows_TD])
    torch.testing.assert_close(projection(rows_TD), expected.double(), rtol=0, atol=1e-6)
    assert (projection.in_features, projection.out_features) == (6, 5)
    assert ("0.residual.weight" in projection.state_dict()) == (inner != 6), (
        "equal widths add the input itself"
    )


@pytest.mark.parametrize(("inner", "activation"), [(9, "gelu"), (6, "tanh"), (9, "identity")])
def test_gradients_are_those_of_finite_differences(inner, activation):
    """Central differences of the naive loop's own sum, in float64, for every weight."""
    torch.manual_seed(4)
    layers = residual_layers(6, inner, 5, activation)
    projection = Projection(layers).double()
    rows_TD = torch.randn(4, 6, dtype=torch.float64)
    want_TC = torch.randn(4, 5, dtype=torch.float64)
    (projection(rows_TD) * want_TC).sum().backward()
    state = {name: tensor.clone() for name, tensor in projection.state_dict().items()}

    def value():
        made = torch.tensor([naive(state, layers, row.tolist()) for row in rows_TD], dtype=torch.float64)
        return float((made * want_TC).sum())

    for name, parameter in projection.named_parameters():
        flat, gradient = state[name].view(-1), parameter.grad.view(-1)
        for place in range(0, flat.numel(), max(1, flat.numel() // 7)):
            kept = flat[place].item()
            flat[place] = kept + 1e-5
            above = value()
            flat[place] = kept - 1e-5
            below = value()
            flat[place] = kept
            assert gradient[place].item() == pytest.approx((above - below) / 2e-5, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("inner", [32, 48])
def test_a_new_block_starts_as_the_matrix_alone_and_learns(folder, inner):
    """Wide enough a block adds nothing: rows are those of colbert_linear.pt, which becomes the last layer."""
    plain, layered = load(folder), load(folder, multi_vector_hidden=inner)
    texts = pack_texts(random_token_ids(LENGTHS, vocab_size=300))
    torch.testing.assert_close(
        represent(layered, texts).multi_KC, represent(plain, texts).multi_KC, rtol=0, atol=1e-5
    )
    represent(layered, texts).multi_KC.square().cumsum(0).sum().backward()
    for name, parameter in layered.multi_vector_head.named_parameters():
        if not name.endswith("bias"):
            assert parameter.grad.abs().max() > 0, f"{name} could never leave 0"


def test_a_narrow_block_keeps_as_many_directions_as_it_can():
    projection = Projection(residual_layers(32, 8, 32, "gelu"))
    init_projection(projection)
    out_TD = projection(torch.eye(32))
    eigenvalues = torch.linalg.eigvalsh(out_TD)
    torch.testing.assert_close(eigenvalues, torch.cat([torch.zeros(24), torch.ones(8)]), rtol=0, atol=1e-5)


def test_names_widths_and_operations(folder):
    model = load(folder, multi_vector_hidden=48, missing_heads="init")
    names = {name for name in model.state_dict() if name.startswith("multi_vector_head.")}
    assert names == {
        "multi_vector_head.0.linear.weight",
        "multi_vector_head.0.linear.bias",
        "multi_vector_head.0.residual.weight",
        "multi_vector_head.1.linear.weight",
        "multi_vector_head.1.linear.bias",
        "multi_vector_head.1.residual.weight",
        "multi_vector_head.2.linear.weight",
        "multi_vector_head.2.linear.bias",
    }
    assert all(is_head_parameter(name) for name in names)
    matrices = sum(model.state_dict()[name].numel() for name in names if name.endswith("weight"))
    plain = encoder_shape(load(folder)).forward_flops([10])
    assert encoder_shape(model).forward_flops([10]) - plain == 10 * 2 * (matrices - 32 * 12)


def test_a_folder_without_the_head_starts_with_the_width_asked_for(tmp_path):
    folder = make_tiny_model_folder(tmp_path, heads=False)
    head = load(folder, missing_heads="init", multi_vector_hidden=64, multi_vector_dim=8).multi_vector_head
    assert [layer.out_features for layer in head.layers] == [64, 32, 8]
    assert head.layers[0].activation == "gelu"
    assert load(folder, missing_heads="init", multi_vector_hidden=64).multi_vector_head.out_features == 32


def write_modules(folder, *configs):
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for n, (kind, config) in enumerate(configs, 1):
        (folder / f"{n}_Dense").mkdir()
        (folder / f"{n}_Dense" / "config.json").write_text(json.dumps(config))
        modules.append({"idx": n, "name": str(n), "path": f"{n}_Dense", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))


PYLATE = "pylate.models.Dense.Dense"
SIZES = {"in_features": 32, "out_features": 8}


def test_layers_for_tokens_are_told_from_those_for_one_vector(tmp_path):
    write_modules(
        tmp_path,
        (
            "sentence_transformers.models.Dense",
            {**SIZES, "activation_function": "torch.nn.modules.activation.Tanh"},
        ),
        (PYLATE, {**SIZES, "activation_function": "torch.nn.modules.activation.SiLU", "use_residual": True}),
        (
            "sentence_transformers.base.modules.dense.Dense",
            {**SIZES, "module_input_name": "token_embeddings"},
        ),
    )
    assert read_token_layers(tmp_path) == {
        "2_Dense": TokenLayer(in_features=32, out_features=8, activation="silu", has_skip=True),
        "3_Dense": TokenLayer(in_features=32, out_features=8),
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**SIZES, "activation_function": "torch.nn.modules.activation.ReLU"},
            r"1_Dense/config\.json': has the activation .*ReLU, .* use one of Identity, GELU, SiLU, Tanh",
        ),
        (
            {"in_features": 32},
            r"modules\.json': names layers that cannot be read \(KeyError: 'out_features'\)",
        ),
        (
            {"in_features": 16, "out_features": 8, "use_residual": True},
            r"its multi-vector layers 16 → 8 \+ skip do not follow an encoder of width 32",
        ),
        (
            {**SIZES, "use_residual": True},
            r"1_Dense/model\.safetensors': cannot be read .*copy the folder again",
        ),
    ],
)
def test_layers_that_cannot_be(tmp_path, config, message):
    folder = make_tiny_model_folder(tmp_path, heads=False)
    write_modules(folder, (PYLATE, config))
    with pytest.raises(CheckpointError, match=message):
        load_m3(str(folder), ModelConfig(path=str(folder)), heads=("dense", "multi_vector"))
