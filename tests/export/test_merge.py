"""Merged folders: weights against formulas in float64, served by M3Embedder; what does not fit is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megam3.cli import main
from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError, ConfigError
from megam3.export.merge import check_weights, merge_folders, slerp
from tests.factory import make_tiny_model_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [
        str(make_tiny_model_folder(tmp_path_factory.mktemp(f"model{seed}"), max_tokens=64, seed=seed))
        for seed in range(3)
    ]


def states(folder):
    files = {"model.safetensors": load_file(f"{folder}/model.safetensors")}
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        files[name] = torch.load(f"{folder}/{name}", weights_only=True)
    return {f"{file}:{key}": tensor for file, state in files.items() for key, tensor in state.items()}


def arc(a, b, t):
    """Numpy, float64, from the angle alone."""
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    cosine = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
    angle = np.arctan2(np.sqrt(max(0.0, 1 - cosine**2)), cosine)
    mixed = np.sin((1 - t) * angle) / np.sin(angle) * x + np.sin(t * angle) / np.sin(angle) * y
    return mixed.reshape(a.shape)


def test_the_mean_of_three(folders, tmp_path, capsys):
    assert main(["merge", *folders, str(tmp_path / "out"), "--weights", "1,2,1"]) == 0
    parts, merged = [states(folder) for folder in folders], states(tmp_path / "out")
    assert merged.keys() == parts[0].keys()
    for name, tensor in merged.items():
        wanted = sum(w * part[name].double() for w, part in zip((0.25, 0.5, 0.25), parts))
        np.testing.assert_allclose(tensor.numpy(), wanted.numpy(), rtol=1e-6, atol=1e-7)
    assert f"{len(merged)} tensors of 3 models by average" in capsys.readouterr().out
    assert M3Embedder(tmp_path / "out", device="cpu").encode("a text").dense_vecs.shape == (32,)


def test_the_arc_between_two(folders, tmp_path):
    merge_folders(folders[:2], tmp_path / "out", [0.7, 0.3], "slerp")
    a, b, merged = states(folders[0]), states(folders[1]), states(tmp_path / "out")
    moved = 0
    for name, tensor in merged.items():
        same = torch.equal(a[name], b[name])
        wanted = a[name].numpy() if same else arc(a[name], b[name], 0.3)
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-5, atol=1e-6)
        moved += not same
    assert moved > 5
    M3Embedder(tmp_path / "out", device="cpu")


def test_the_arcs_ends_and_parallels():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.allclose(slerp(a, b, 0.0), a.double())
    assert torch.allclose(slerp(a, b, 1.0), b.double())
    half = 0.5**0.5
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([half, 2 * half], dtype=torch.float64))
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a.double())
    assert torch.allclose(slerp(a, 0 * a, 0.25), 0.75 * a.double())


def test_dtypes_and_other_files_are_the_firsts(folders, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(folders[0], half)
    state = {name: tensor.half() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    (half / "modules.json").write_text("[]")
    merge_folders([str(half), folders[1]], tmp_path / "out", None, "average")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    assert (tmp_path / "out" / "modules.json").read_text() == "[]"
    assert (tmp_path / "out" / "config.json").read_bytes() == (half / "config.json").read_bytes()


def changed(source, target, change):
    shutil.copytree(source, target)
    change(target)
    return str(target)


def drop_head(folder):
    (folder / "sparse_linear.pt").unlink()


def other_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


def drop_tensor(folder):
    state = load_file(folder / "model.safetensors")
    del state["embeddings.LayerNorm.bias"]
    save_file(state, folder / "model.safetensors")


def widen_head(folder):
    torch.save({"weight": torch.zeros(2, 32), "bias": torch.zeros(2)}, folder / "colbert_linear.pt")


def break_weights(folder):
    (folder / "model.safetensors").write_bytes(b"nothing")


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_head, "do not hold the same heads: sparse_linear.pt"),
        (other_family, "is a bert model, .* is a xlm-roberta model"),
        (drop_tensor, "do not hold the same tensors: embeddings.LayerNorm.bias"),
        (widen_head, r"weight has shape \(2, 32\), in .* \(32, 32\)"),
        (break_weights, "cannot be read"),
        (drop_weights, "holds no weights"),
    ],
)
def test_what_does_not_fit_is_refused(folders, tmp_path, change, message):
    other = changed(folders[1], tmp_path / "other", change)
    with pytest.raises(CheckpointError, match=message):
        merge_folders([folders[0], other], tmp_path / "out", None, "average")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "shares"), [("average", [0.5, 0.5]), ("slerp", [1.0, 0.0])])
def test_a_bare_encoder_has_no_say_in_the_heads(folders, tmp_path, method, shares):
    bare = tmp_path / "bare"
    shutil.copytree(folders[0], bare, ignore=shutil.ignore_patterns("*.pt"))
    merge_folders([str(bare), folders[1]], tmp_path / "out", shares, method)
    merged, first, trained = states(tmp_path / "out"), states(folders[0]), states(folders[1])
    for name, tensor in merged.items():
        wanted = trained[name] if ".pt:" in name else shares[0] * first[name] + shares[1] * trained[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_two_bare_encoders_merge_without_heads(folders, tmp_path):
    for number in (0, 1):
        shutil.copytree(folders[number], tmp_path / str(number), ignore=shutil.ignore_patterns("*.pt"))
    merge_folders([str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "out", None, "average")
    assert not list((tmp_path / "out").glob("*.pt"))


def test_another_vocabulary_is_refused(folders, tmp_path):
    other = make_tiny_model_folder(tmp_path / "other", max_tokens=64, vocab_size=300)
    with pytest.raises(CheckpointError, match="has another vocabulary than"):
        merge_folders([folders[0], str(other)], tmp_path / "out", None, "average")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, None, "average"), "folders = 1: merging takes at least two models"),
        ((3, None, "slerp"), "folders = 3: slerp merges exactly two models"),
        ((2, [1.0], "average"), "--weights = .*: must be 2 numbers, none negative, not all 0"),
        ((2, [1.0, -1.0], "average"), "must be 2 numbers, none negative"),
        ((2, [0.0, 0.0], "average"), "not all 0"),
        ((2, None, "ties"), "--method = 'ties': must be one of average, slerp"),
    ],
)
def test_impossible_requests(given, message):
    with pytest.raises(ConfigError, match=message):
        check_weights(*given)


def test_messages_on_the_command_line(folders, tmp_path, capsys):
    assert main(["merge", *folders[:2], str(tmp_path / "out"), "--weights", "a,b"]) == 2
    assert "--weights = 'a,b': must be numbers separated by commas" in capsys.readouterr().err
    assert main(["merge", *folders[:2], folders[2]]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["merge", folders[0], "nowhere", str(tmp_path / "out")]) == 2
    assert "is no folder on this machine" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no model folder .no config.json.; give exported folders"):
        merge_folders([folders[0], tmp_path / "empty"], tmp_path / "out", None, "average")
