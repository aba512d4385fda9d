"""What every exported folder holds: the encoder's weights and config, its tokenizer, and its pooler if it has
one."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megam3.encoders import FAMILIES
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.files import read_json, write_json
from megam3.model.backbone import reads_causally
from megam3.model.m3 import M3Model, max_model_tokens
from megam3.model.pretrained import load_tokenizer_of

# fields of the published config.json that transformers 5 no longer writes and older readers look for
_PUBLISHED_FIELDS = {
    "classifier_dropout": None,
    "output_past": True,
    "position_embedding_type": "absolute",
    "use_cache": True,
}


def write_encoder_files(out: Path, model: M3Model, source: Path, spare: dict[str, Tensor]) -> int:
    """config.json, model.safetensors (keys without prefix, and `spare` beside them) and the tokenizer into
    `out`.

    Returns:
        The longest text, in tokens, special ones included.
    """
    max_tokens = min(max_model_tokens(model), load_tokenizer_of(str(source)).model_max_length)
    config = published_config(read_json(source / "config.json"), type(model.encoder).__name__)
    field = FAMILIES[model.encoder.config.model_type].direction_field
    if field:
        # the direction the model was trained in, which transformers reads from here
        config[field] = reads_causally(model.encoder.config) == (field == "is_causal")
    write_json(out / "config.json", config)
    weights = {
        name: tensor.detach().cpu().float().contiguous()
        for name, tensor in model.encoder.state_dict().items()
    }
    save_file({**weights, **spare}, out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer_files(source, out, max_tokens)
    return max_tokens


def published_config(config: dict, architecture: str) -> dict:
    """The source's config.json as released models have it: class named, and `torch_dtype`, since `dtype` is
    unknown to older readers."""
    dropped = ("dtype", "transformers_version", "_name_or_path")
    kept = {key: value for key, value in config.items() if key not in dropped}
    defaults = {} if FAMILIES[config["model_type"]].is_rotary else _PUBLISHED_FIELDS
    return dict(
        sorted({**defaults, **kept, "architectures": [architecture], "torch_dtype": "float32"}.items())
    )
