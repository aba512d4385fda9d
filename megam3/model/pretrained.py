"""Read an M3Model from a Hugging Face folder: the encoder, and its heads from what lies beside it
(`head_files.py`)."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from megam3.config.head_layers import find_layers
from megam3.config.schema import ModelConfig
from megam3.config.weights import HEADS
from megam3.encoders import HEAD_FILES, find_expansion_problem, read_encoder_config
from megam3.errors import CheckpointError, ConfigError
from megam3.model.backbone import load_backbone, load_encoder_config
from megam3.model.head_files import fill_head, read_heads, width_of_file
from megam3.model.lora import add_lora
from megam3.model.m3 import M3Model
from megam3.model.masked_lm import fill_lm_head
from megam3.model_files import read_model_object
from megam3.reading import OWN_FILE, Reading, find_first_problem, resolve_reading
from megam3.token_layers import TokenLayer, find_vector_layers, has_head

_VOCABULARY_FILES = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")


def load_m3(
    path: str,
    config: ModelConfig,
    *,
    special_ids: tuple[int, ...] | None = None,
    heads: Collection[str] = HEADS,
    dtype: torch.dtype = torch.float32,
) -> M3Model:
    """The model in folder `path`; `config` gives dropout, adapters, the width of the multi-vector head and
    what to do about missing heads.

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
    # first: the clearest error, before anything large is read
    encoder_config = load_encoder_config(path, config.attention)
    reading = read_settings(path, encoder_config, config)
    expands = "lexical" in heads and expands_lexically(path, config)
    from_files = [head for head in HEAD_FILES if head in heads and not (expands and head == "lexical")]
    layers: tuple[TokenLayer, ...] = ()
    if "multi_vector" in heads:
        stored = None if config.multi_vector_hidden is None else width_of_file(folder)
        layers = find_layers(folder, config, encoder_config.hidden_size, stored)
    found = read_heads(folder, from_files, config.missing_heads)
    tokenizer = load_tokenizer_of(path)
    first_id = find_first_id(tokenizer, path, reading)
    encoder = load_backbone(
        path,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        attention=config.attention,
        dtype=dtype,
    )
    width, matrix = config.multi_vector_dim, found.get("multi_vector")
    if width is None and isinstance(matrix, dict):
        width = matrix["weight"].shape[0]
    model = M3Model(
        encoder,
        find_special_ids(tokenizer) if special_ids is None else special_ids,
        multi_vector_dim=width,
        multi_vector_layers=layers,
        lexical_init_bias=config.lexical_init_bias,
        heads=heads,
        expands=expands,
        expansion_top_k=config.expansion_top_k or _own_top_k(folder),
        reading=reading,
        first_id=first_id,
    )
    if model.expansion_head is not None:
        fill_lm_head(model.expansion_head, folder, required=config.missing_heads == "error")
    for module, head in ((model.lexical_head, "lexical"), (model.multi_vector_head, "multi_vector")):
        if module is not None:
            fill_head(module, found[head], folder / HEAD_FILES[head])
    if config.lora is not None:
        add_lora(model.encoder, config.lora)
    return model.to(dtype)


def _own_top_k(folder: Path) -> int | None:
    """How an exported folder says that its expansion head is pruned."""
    return (
        read_model_object(folder / OWN_FILE).get("expansion_top_k") if (folder / OWN_FILE).is_file() else None
    )


def held_heads(path: str) -> tuple[str, ...]:
    """The heads whose weights are in folder `path`; the dense head has none and is always there.

    Raises:
        CheckpointError: the folder says of itself that it has a head, and the weights are missing; or its
            dense vector is not what megam3 would make of it.
    """
    folder = Path(path)
    behind = find_vector_layers(folder)
    if behind:
        rule = f"puts its dense vector through {', '.join(behind)}, which megam3 does not compute"
        remedy = "use sentence-transformers, or import it and train on"
        raise CheckpointError("model", path, rule, remedy)
    own = read_model_object(folder / OWN_FILE) if (folder / OWN_FILE).is_file() else {}
    expands = own.get("lexical_kind") == "expansion"
    held = [
        name for name in HEADS if name == "dense" or has_head(folder, name) or (expands and name == "lexical")
    ]
    lost = [name for name in own.get("heads", ()) if name not in held]
    if lost:
        rule = f"names the heads {', '.join(own['heads'])}, and the weights of {', '.join(lost)} are missing"
        raise CheckpointError("model", str(folder / OWN_FILE), rule, "copy or export the folder again")
    return tuple(held)


def refuse_missing_heads(held: Sequence[str], wanted: Sequence[str], field: str) -> None:
    """Refuse heads that a model does not have; `held` are its own, `field` is where others were asked for.

    Raises:
        ConfigError: the first that is missing.
    """
    for head in wanted:
        if head not in held:
            rule = f"the model has no {head.replace('_', '-')} head, only {', '.join(held)}"
            remedy = "ask for those it has, or train one: objective.heads with model.missing_heads=init"
            raise ConfigError(field, head, rule, remedy)


def expands_lexically(path: str, config: ModelConfig) -> bool:
    """Whether the lexical head is an expansion head: as the recipe says, else as the folder does.

    Raises:
        ConfigError: the encoder's masked-LM head has another shape than the expansion head.
    """
    kind = config.lexical_kind
    if kind is None:
        own = Path(path) / "megam3_config.json"
        kind = read_model_object(own).get("lexical_kind") if own.is_file() else None
    if kind != "expansion":
        return False
    problem = find_expansion_problem(read_encoder_config(path))
    if problem is not None:
        raise problem
    return True


def read_settings(path: str, encoder: PretrainedConfig, config: ModelConfig) -> Reading:
    """How the model in folder `path` makes its dense vector under the settings `config`.

    Raises:
        ConfigError: see `resolve_reading`.
    """
    return resolve_reading(
        path,
        {**encoder.to_dict(), "model_type": encoder.model_type},
        pooling=config.pooling,
        cls_every_tokens=config.cls_every_tokens,
        attention=config.attention,
    )


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
    return find_special_ids(load_tokenizer_of(path))


def find_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """As `read_special_ids`, of a tokenizer that is loaded."""
    roles = ("bos", "cls", "eos", "sep", "pad", "unk")
    ids = {getattr(tokenizer, f"{role}_token_id") for role in roles}
    return tuple(sorted(ids - {None}))


def find_first_id(tokenizer: PreTrainedTokenizerBase, path: str, reading: Reading) -> int | None:
    """The special token that the tokenizer in folder `path` puts before a text; None: it puts none (Qwen's).

    Raises:
        ConfigError: the dense vector is to be read from such a token, and there is none.
    """
    framed = tokenizer("a")["input_ids"]
    first_id = framed[0] if framed and framed[0] in tokenizer.all_special_ids else None
    problem = find_first_problem(reading, first_id, path)
    if problem is not None:
        raise problem
    return first_id
