"""Read an M3Model from a Hugging Face folder: the encoder, and its heads from `sparse_linear.pt` and
`colbert_linear.pt` beside it."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megam3.config.objective import HEADS
from megam3.config.schema import ModelConfig
from megam3.encoders import HEAD_FILES
from megam3.errors import CheckpointError
from megam3.model.backbone import load_backbone, load_encoder_config
from megam3.model.m3 import M3Model

_VOCABULARY_FILES = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")


def load_m3(
    path: str,
    config: ModelConfig,
    *,
    special_ids: tuple[int, ...] | None = None,
    heads: Collection[str] = HEADS,
    dtype: torch.dtype = torch.float32,
) -> M3Model:
    """The model in folder `path`; `config` gives dropout, the width of the multi-vector head and what to do
    about missing heads.

    Under ZeRO-3 keep an HfDeepSpeedConfig alive and call this outside `deepspeed.zero.Init`: transformers
    partitions the encoder while it loads, and the heads, small and whole, are partitioned by
    `deepspeed.initialize`.

    Args:
        special_ids: ids without lexical weight; None: read from the folder's tokenizer.
        heads: which heads to read; the files of the others are not looked at.

    Raises:
        ConfigError: an encoder that cannot be served.
        CheckpointError: unreadable or unfitting weights, or missing heads under `model.missing_heads: error`.
    """
    folder = Path(path)
    load_encoder_config(path)  # first: the clearest error, before anything large is read
    found = {head: _read_head(folder / HEAD_FILES[head], config) for head in HEAD_FILES if head in heads}
    if special_ids is None:
        special_ids = read_special_ids(path)
    encoder = load_backbone(
        path, hidden_dropout=config.hidden_dropout, attention_dropout=config.attention_dropout, dtype=dtype
    )
    width = config.multi_vector_dim
    multi_vector = found.get("multi_vector")
    if width is None and multi_vector is not None:
        width = multi_vector["weight"].shape[0]
    model = M3Model(
        encoder,
        special_ids,
        multi_vector_dim=width,
        lexical_init_bias=config.lexical_init_bias,
        heads=heads,
    )
    for linear, head in ((model.lexical_head, "lexical"), (model.multi_vector_head, "multi_vector")):
        if linear is not None:
            _fill_head(linear, found[head], folder / HEAD_FILES[head])
    return model.to(dtype)


def load_tokenizer_of(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in folder `path`.

    Raises:
        CheckpointError: no tokenizer files, or unreadable ones.
    """
    remedy = "put the encoder's tokenizer files there"
    # without any of them transformers 5 builds a tokenizer of 5 tokens and says nothing
    if not any((Path(path) / name).exists() for name in _VOCABULARY_FILES):
        raise CheckpointError(
            "model.path", path, f"holds no tokenizer (none of {', '.join(_VOCABULARY_FILES)})", remedy
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizer raises bare Exceptions for damaged files
        raise CheckpointError(
            "model.path", path, f"holds no readable tokenizer ({str(error).splitlines()[0]})", remedy
        ) from error


def read_special_ids(path: str) -> tuple[int, ...]:
    """Ids of begin, end, padding and unknown of the tokenizer in folder `path`; config.json does not know the
    unknown token.

    Raises:
        CheckpointError: no readable tokenizer.
    """
    tokenizer = load_tokenizer_of(path)
    roles = ("bos", "cls", "eos", "sep", "pad", "unk")
    ids = {getattr(tokenizer, f"{role}_token_id") for role in roles}
    return tuple(sorted(ids - {None}))


def _read_head(file: Path, config: ModelConfig) -> dict[str, Tensor] | None:
    if not file.exists():
        if config.missing_heads == "error":
            raise CheckpointError(
                "model.path",
                str(file),
                "head weights are missing",
                "set model.missing_heads: init to start this head from scratch",
            )
        return None
    try:
        head = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each way in which a file can be damaged
        raise CheckpointError(
            "model.path",
            str(file),
            f"cannot be read ({error})",
            "write it with torch.save({'weight': …, 'bias': …})",
        ) from error
    if not isinstance(head, dict) or set(head) != {"weight", "bias"}:
        found = sorted(head) if isinstance(head, dict) else type(head).__name__
        raise CheckpointError(
            "model.path",
            str(file),
            f"must hold exactly weight and bias, not {found}",
            "export the head again",
        )
    return head


@torch.no_grad()
def _fill_head(linear: nn.Linear, head: dict[str, Tensor] | None, file: Path) -> None:
    if head is None:
        return
    for name, parameter in (("weight", linear.weight), ("bias", linear.bias)):
        if head[name].shape != parameter.shape:
            raise CheckpointError(
                "model.path",
                str(file),
                f"{name} has shape {tuple(head[name].shape)}, the model needs {tuple(parameter.shape)}",
                "use the heads that belong to this encoder, or set model.multi_vector_dim to their width",
            )
        parameter.copy_(head[name])
