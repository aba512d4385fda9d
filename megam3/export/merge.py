"""One model from the weights of several: a weighted mean, or the arc between two (SLERP).

    average  Σ w_i · θ_i with Σ w_i = 1 (model soups, arXiv 2203.05482; against forgetting: arXiv 2311.13534)
    slerp    for each tensor, with θ the angle between a and b as vectors and t the weight of b:
             sin((1-t)·θ)/sin θ · a + sin(t·θ)/sin θ · b     (Shoemake, 1985); a line where parallel

Everything that is no weight (config, tokenizer, other readers' files) comes from the first folder. A bare
encoder has no say in the heads: merged with what it was finetuned to, the result has the finetuned heads.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megam3.errors import CheckpointError, ConfigError
from megam3.files import atomic_folder, read_json
from megam3.model.pretrained import load_tokenizer_of
from megam3.model_files import refuse_links_out
from megam3.token_layers import WEIGHTS_FILE, read_token_layers

METHODS = ("average", "slerp")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.pt")
_PARALLEL = 1e-7
"""Below this sine of the angle the arc is a line, and its formula a quotient of two zeros."""

Combine = Callable[[Sequence[Tensor]], Tensor]


def merge_folders(
    folders: Sequence[str], out: str | Path, weights: Sequence[float] | None, method: str
) -> int:
    """Merge model folders into the new folder `out`; computed in float64, written in the first folder's
    dtypes.

    Args:
        weights: one a folder, scaled to the sum 1; None: equal.

    Returns:
        How many tensors were merged.

    Raises:
        ConfigError: too few folders, weights that do not fit, an unknown method.
        CheckpointError: `out` exists; a folder is missing or unreadable; configs, tokenizers, names or shapes
            differ.
    """
    shares = check_weights(len(folders), weights, method)
    out = Path(out)
    if out.exists():
        raise CheckpointError("output", str(out), "exists already", "remove it, or choose another name")
    paths = [_checked_folder(folder, folders[0]) for folder in folders]
    refuse_links_out(paths[0], "model")
    with atomic_folder(out) as aside:
        combine = _combination(method, shares)
        merged = _merge_states([_encoder_weights(path) for path in paths], paths, combine)
        save_file(merged, aside / "model.safetensors", metadata={"format": "pt"})
        count = len(merged) + _merge_heads(paths, shares, method, aside)
        _copy_the_rest(paths[0], aside)
    return count


def _combination(method: str, shares: Sequence[float]) -> Combine:
    if method == "slerp" and len(shares) == 2:
        return lambda parts: slerp(parts[0], parts[1], shares[1])
    return lambda parts: average(parts, shares)


def _merge_heads(paths: Sequence[Path], shares: Sequence[float], method: str, out: Path) -> int:
    """Those of the folders that have heads, in their shares; returns how many tensors were written."""
    having = [(path, share) for path, share in zip(paths, shares) if _own_head_files(path)]
    total = sum(share for _, share in having)
    # the model whose heads are the only ones may itself have weight 0: then they count alike
    combine = _combination(method, [share / total if total else 1 / len(having) for _, share in having])
    count = 0
    holders = [path for path, _ in having]
    for name in _head_files(holders):
        load = _load_safetensors if name.endswith(".safetensors") else _load_torch
        head = _merge_states([load(path / name) for path in holders], holders, combine)
        (out / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(head, out / name, metadata={"format": "pt"})
        else:
            torch.save(head, out / name)
        count += len(head)
    return count


def check_weights(num_folders: int, weights: Sequence[float] | None, method: str) -> list[float]:
    """The weights, scaled to the sum 1.

    Raises:
        ConfigError: they do not fit the folders or the method.
    """
    if method not in METHODS:
        raise ConfigError("--method", method, f"must be one of {', '.join(METHODS)}", "use average")
    if num_folders < 2 or (method == "slerp" and num_folders != 2):
        rule = "slerp merges exactly two models" if method == "slerp" else "merging takes at least two models"
        raise ConfigError("folders", num_folders, rule, "name the models, then the output")
    given = list(weights) if weights is not None else [1.0] * num_folders
    if len(given) != num_folders or min(given) < 0 or not math.isfinite(sum(given)) or sum(given) == 0:
        rule = f"must be {num_folders} numbers, none negative, not all 0"
        raise ConfigError("--weights", given, rule, "give one for each model, e.g. 0.7,0.3")
    return [weight / sum(given) for weight in given]


def average(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ share · part, float64."""
    return sum(
        (share * part.double() for share, part in zip(shares, parts)), torch.zeros((), dtype=torch.float64)
    )


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at `t` of the arc from `first` (0) to `second` (1), float64; each tensor is one vector."""
    a, b = first.double(), second.double()
    norms = a.norm() * b.norm()
    cosine = float((a.flatten() @ b.flatten() / norms).clamp(-1, 1)) if norms > 0 else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < _PARALLEL:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def _checked_folder(folder: str, first: str) -> Path:
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError("model", folder, "is no model folder (no config.json)", "give exported folders")
    kinds = [read_json(Path(f) / "config.json").get("model_type") for f in (first, folder)]
    if kinds[0] != kinds[1]:
        rule = f"is a {kinds[1]} model, {first} is a {kinds[0]} model"
        raise CheckpointError("model", folder, rule, "merge models of one architecture")
    # the same shapes with other ids would merge without complaint and mean nothing
    vocabularies = [load_tokenizer_of(f).get_vocab() for f in dict.fromkeys((first, folder))]
    if vocabularies[0] != vocabularies[-1]:
        rule = f"has another vocabulary than {first}"
        raise CheckpointError("model", folder, rule, "merge models that share their tokenizer")
    return path


def _encoder_weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        rule = "holds no weights (no *.safetensors, no pytorch_model*.bin)"
        raise CheckpointError("model", str(folder), rule, "export it again")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _load_safetensors(file) if file.suffix == ".safetensors" else _load_torch(file)
    return state


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises a class of its own for each kind of damage
        raise CheckpointError("model", str(file), f"cannot be read ({error})", "export it again") from error


def _load_torch(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each way in which a file can be damaged
        raise CheckpointError("model", str(file), f"cannot be read ({error})", "export it again") from error


def _own_head_files(path: Path) -> set[str]:
    """Published head files, and the layers of a multi-vector head."""
    layers = {f"{place}/{WEIGHTS_FILE}" for place in read_token_layers(path)}
    return {file.name for file in path.glob("*.pt")} | {name for name in layers if (path / name).is_file()}


def _head_files(paths: Sequence[Path]) -> list[str]:
    names = [_own_head_files(path) for path in paths]
    if not paths:
        return []
    first_layers = read_token_layers(paths[0])
    for path, own in zip(paths, names):
        if read_token_layers(path) != first_layers:
            rule = f"and {paths[0]} have multi-vector layers of other kinds"
            raise CheckpointError("model", str(path), rule, "merge models with the same heads")
        if own != names[0]:
            odd = sorted(own ^ names[0])
            rule = f"and {paths[0]} do not hold the same heads: {', '.join(odd)}"
            raise CheckpointError("model", str(path), rule, "merge models with the same heads")
    return sorted(names[0])


def _merge_states(
    states: Sequence[Mapping[str, Tensor]], paths: Sequence[Path], combine: Combine
) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for path, state in zip(paths, states):
        if state.keys() != states[0].keys():
            odd = sorted(state.keys() ^ states[0].keys())
            rule = f"and {paths[0]} do not hold the same tensors: {', '.join(odd[:3])}"
            raise CheckpointError("model", str(path), rule, "merge models of one architecture")
    for name, tensor in states[0].items():
        parts = [state[name] for state in states]
        for path, part in zip(paths, parts):
            if part.shape != tensor.shape:
                rule = f"{name} has shape {tuple(part.shape)}, in {paths[0]} {tuple(tensor.shape)}"
                raise CheckpointError("model", str(path), rule, "merge models of one architecture")
        # integer tensors are tables of positions, not weights
        merged[name] = combine(parts).to(tensor.dtype).contiguous() if tensor.is_floating_point() else tensor
    return merged


def _copy_the_rest(source: Path, out: Path) -> None:
    weights = {file for pattern in _WEIGHT_FILES for file in source.glob(pattern)}
    layers = {str(source / place) for place in read_token_layers(source)}

    def merged(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if folder in layers and name == WEIGHTS_FILE]

    for entry in sorted(source.iterdir()):
        if entry in weights or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, out / entry.name, ignore=merged, dirs_exist_ok=True)
        else:
            shutil.copyfile(entry, out / entry.name)
