"""More position rows for an encoder with learned absolute positions (XLM-R: 514 rows → 8194 for 8192 tokens).

By default rows already there stay as they are, and new rows repeat them in a cycle: position p takes the row
of position p mod (old number of positions). Other beginnings are a choice (`PositionMethod`).
Local order thus keeps its meaning everywhere from the start, as is usual for long variants of BERT-like
encoders. Before any training `tile` and `interpolate` predict masked words of long texts equally well, and
`random` worse (docs/experiments.md); of the two, `tile` alone leaves short texts as they were, hence the
default. arXiv 2402.03216 does not say how its rows began, only that RetroMAE training on long texts follows.

    offset 2, 3 old positions:  rows  – – a b c   →   – – a b c a b c a
    (the first two rows belong to padding)
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from megam3.errors import CheckpointError, ConfigError
from megam3.files import atomic_folder
from megam3.model.backbone import first_position, load_encoder_config
from megam3.model.rotary import is_rotary
from megam3.model_files import read_model_object, refuse_links_out

PositionMethod = Literal["tile", "interpolate", "random"]
"""How new rows begin; see `extend_position_rows`."""

_WEIGHTS = "model.safetensors"
_ROWS_NAME = "embeddings.position_embeddings.weight"


def extend_position_rows(
    rows_RD: Tensor, num_positions: int, offset: int, method: PositionMethod = "tile"
) -> Tensor:
    """[offset + num_positions, D]; the first `offset` rows belong to padding and stay.

    Args:
        method: `tile` keeps the old rows and repeats them in a cycle; `interpolate` stretches the old rows
            linearly over all positions (first and last stay, every position between changes); `random` keeps
            the old rows and draws the new ones from a normal distribution of the old rows' mean and deviation
            per dimension, from a fixed seed.

    Raises:
        ValueError: fewer positions than there are.
    """
    old = rows_RD.shape[0] - offset
    if num_positions < old:
        raise ValueError(f"{num_positions} positions are fewer than the {old} there are")
    known = rows_RD[offset:]
    if method == "tile":
        position = torch.arange(num_positions, device=rows_RD.device)
        return torch.cat([rows_RD[:offset], known[position % old]])
    if method == "interpolate":
        stretched = interpolate(known.T[None].float(), size=num_positions, mode="linear", align_corners=True)
        return torch.cat([rows_RD[:offset], stretched[0].T.to(rows_RD.dtype)])
    drawn = torch.randn(num_positions - old, rows_RD.shape[1], generator=torch.Generator().manual_seed(0))
    deviation, mean = torch.std_mean(known.float(), dim=0)
    drawn = mean + deviation * drawn.to(rows_RD.device)
    return torch.cat([rows_RD, drawn.to(rows_RD.dtype)])


def extend_folder(
    source: str | Path, out: str | Path, max_tokens: int, method: PositionMethod = "tile"
) -> tuple[int, int]:
    """Copy the encoder folder `source` to `out` with positions for `max_tokens` tokens; tokenizer, heads and
    all other weights stay.

    Returns:
        Tokens the encoder took before and takes now.

    Raises:
        ConfigError: shrinking, or an encoder without learned positions.
        CheckpointError: unreadable weights, or `out` exists.
    """
    source, out = Path(source), Path(out)
    config = load_encoder_config(str(source))
    if is_rotary(config):
        rule = f"is a {config.model_type} model, whose positions are rotary: it has no rows to add"
        raise ConfigError("IN", str(source), rule, "scale its angles with --method ntk or yarn")
    offset = first_position(config)
    old = config.max_position_embeddings - offset
    if max_tokens <= old:
        raise ConfigError(
            "--max-tokens",
            max_tokens,
            f"must exceed the {old} tokens that {source} takes already",
            "rows are never removed",
        )
    if out.exists():
        raise CheckpointError("OUT", str(out), "exists already", "remove it or choose another name")
    refuse_links_out(source, "IN")
    name, weights = _read_weights(source)
    weight_files = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
    with atomic_folder(out) as aside:
        shutil.copytree(
            source,
            aside,
            ignore=lambda _, names: [n for n in names if n.endswith(weight_files)],
            dirs_exist_ok=True,
        )
        weights[name] = extend_position_rows(weights[name], max_tokens, offset, method)
        save_file(
            {key: tensor.contiguous() for key, tensor in weights.items()},
            aside / _WEIGHTS,
            metadata={"format": "pt"},
        )
        _update_json(aside / "config.json", "max_position_embeddings", max_tokens + offset)
        _update_json(aside / "tokenizer_config.json", "model_max_length", max_tokens)
        if (aside / "sentence_bert_config.json").exists():
            _update_json(aside / "sentence_bert_config.json", "max_seq_length", max_tokens)
    return old, max_tokens


def _read_weights(source: Path) -> tuple[str, dict[str, Tensor]]:
    """All weights of the folder and the name of the position rows among them."""
    weights: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            weights |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if not weights:
        for file in sorted(source.glob("pytorch_model*.bin")):
            weights |= torch.load(file, map_location="cpu", weights_only=True)
        # a .bin may hold one tensor under two names, which safetensors refuses
        weights = {key: tensor.clone() for key, tensor in weights.items()}
    names = [key for key in weights if key.endswith(_ROWS_NAME)]
    if len(names) != 1:
        rule = f"its weight files hold {len(names)} tensors named {_ROWS_NAME}, not one"
        raise CheckpointError("IN", str(source), rule, "give the folder of an encoder with its weights")
    # buffers of old versions are as long as the positions were
    return names[0], {
        key: tensor for key, tensor in weights.items() if not key.endswith(("position_ids", "token_type_ids"))
    }


def _update_json(file: Path, key: str, value: int) -> None:
    content = read_model_object(file) if file.exists() else {}
    file.write_text(
        json.dumps({**content, key: value}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
