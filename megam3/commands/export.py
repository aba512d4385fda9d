"""A training checkpoint of any ZeRO stage and world size → a folder other software reads, without GPUs or
ranks.

megam3 export runs/NAME/checkpoints/step-000500 OUT [--format bge-m3] [--model FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megam3.checkpoint import consolidated_weights
from megam3.config import recipe_yaml
from megam3.config.schema import ModelConfig
from megam3.export.bge_m3 import source_of_checkpoint
from megam3.export.formats import FORMATS, export
from megam3.export.model_card import NO_FACTS, CardFacts, facts_of_checkpoint
from megam3.model.hub import push_folder


def main(argv: Sequence[str]) -> int:
    """Convert, print the largest difference per head, return the exit code.

    Raises:
        CheckpointError: no complete checkpoint, no source folder, an export that differs, or OUT exists.
        ConfigError: an impossible format, or the hub refuses or cannot be reached.
    """
    options = _parser().parse_args(argv)
    state = consolidated_weights(options.checkpoint)
    source = options.model or source_of_checkpoint(options.checkpoint)
    facts = _facts(options.checkpoint)
    differences = export(
        state,
        source,
        options.out,
        format=options.format,
        int8=options.int8,
        facts=facts,
        settings=_settings(options.checkpoint, source),
    )
    for head, value in differences.items():
        print(f"largest difference, {head} head: {value:.2e}")
    print(f"written: {options.out}")
    if options.push:
        print(f"pushed: {push_folder(options.out, options.push)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megam3 export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder of one checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="folder the training started from (default: model.path of the run's recipe, else the "
        "checkpoint's model/)",
    )
    parser.add_argument(
        "--format",
        default="bge-m3",
        metavar="FORMAT",
        help=f"one of {', '.join(FORMATS)} (default: bge-m3)",
    )
    parser.add_argument(
        "--int8", action="store_true", help="with onnx: a quantised graph beside the exact one"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload OUT to this hub repository (private when new)"
    )
    return parser


def _settings(checkpoint: str, source: str) -> ModelConfig:
    """Pooling, direction, adapters and multi-vector block of the run; a recipe of another version may have no
    such fields."""
    file = Path(checkpoint).resolve().parent.parent / "recipe.yaml"
    section = recipe_yaml.read(file).data["model"] if file.is_file() else {}  # type: ignore[index]
    names = (
        "pooling",
        "cls_every_tokens",
        "attention",
        "lora",
        "multi_vector_hidden",
        "multi_vector_activation",
    )
    return ModelConfig.model_validate({"path": source, **{name: section.get(name) for name in names}})


def _facts(checkpoint: str) -> CardFacts:
    file = Path(checkpoint).resolve().parent.parent / "recipe.yaml"
    if not file.is_file():
        return NO_FACTS
    text = file.read_text(encoding="utf-8")
    recipe = recipe_yaml.parse(text, str(file)).data
    assert isinstance(recipe, dict), "megam3 wrote this file as a mapping of sections"
    return facts_of_checkpoint(checkpoint, recipe, text)
