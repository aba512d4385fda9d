"""README.md of an exported folder: usage in each consumer, what others would invent, and the run it came
from."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megam3 import __version__
from megam3.files import read_json
from megam3.instructions import Instructions, instructions_of
from megam3.reading import Pooling

_FLAGEMBEDDING_POOLINGS = {"mean": "mean", "last": "last_token"}

_WARNING = """
## Other loaders

`MultiVectorEncoder` and `SparseEncoder` of sentence-transformers, and `ColBERT` of pylate, also open a folder
of the bge-m3 layout, but they do not read its heads: they add a projection with RANDOM weights and say little
about it. Use `megam3 export CHECKPOINT OUT --format multi-vector` for the first and `--format pylate` for the
last. There is no export for `SparseEncoder`: its pooling takes the logarithm of scores over the whole
vocabulary, which is not what the lexical head computes.
"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What is known of the run; empty parts are left out of the card."""

    recipe_yaml: str = ""
    """recipe.yaml of the run, as it stands."""
    datasets: tuple[str, ...] = ()
    """Names of the training datasets."""
    step: str = ""
    """Folder name of the checkpoint."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """By file name in the run's eval/ folder, its content."""
    instructions: Instructions = Instructions()
    """What queries and passages got in training."""


NO_FACTS = CardFacts()


def facts_of_checkpoint(checkpoint: str | Path, recipe: Mapping[str, Any], recipe_yaml: str) -> CardFacts:
    """Recipe, datasets and evaluations of the run that RUN/checkpoints/STEP belongs to."""
    folder = Path(checkpoint).resolve()
    files = sorted((folder.parent.parent / "eval").glob("*.json"))
    data = recipe.get("data", {}).get("train", [])
    return CardFacts(
        recipe_yaml=recipe_yaml,
        datasets=tuple(str(dataset.get("name")) for dataset in data),
        step=folder.name,
        evaluation={file.stem: read_json(file) for file in files},
        instructions=instructions_of(recipe),
    )


def bge_m3_card(
    heads: Collection[str],
    hidden_size: int,
    width: int | None,
    max_tokens: int,
    facts: CardFacts,
    pooling: Pooling = "cls",
) -> str:
    """The card of the bge-m3 layout; `width` is the multi-vector head's, None without one."""
    if pooling == "mcls":
        return _mcls_card(heads, max_tokens, facts)
    is_narrow = width is not None and width != hidden_size
    option = f", colbert_dim={width}" if is_narrow else ""
    option += "" if pooling == "cls" else f', pooling_method="{_FLAGEMBEDDING_POOLINGS[pooling]}"'
    usage = [
        "    from sentence_transformers import SentenceTransformer",
        '    SentenceTransformer(FOLDER).encode(["a text"])                          # the dense head',
    ]
    if {"lexical", "multi_vector"} <= set(heads):
        usage = [
            "    from megam3.embedder import M3Embedder",
            '    M3Embedder(FOLDER).encode(["a text"])                                   # all three heads',
            "",
            "    from FlagEmbedding import BGEM3FlagModel",
            f"    model = BGEM3FlagModel(FOLDER{option})",
            '    model.encode(["a text"], return_dense=True, return_sparse=True, return_colbert_vecs=True)',
            "",
            *usage,
        ]
    if is_narrow:
        usage += [
            "",
            f"The multi-vector head has {width} dimensions: FlagEmbedding must be told so"
            f" (`colbert_dim={width}`).",
        ]
    if pooling != "cls":
        usage += ["", f"The dense vector is pooled by {pooling!r}; FlagEmbedding must be told so, as above."]
    return _card(_title(heads, max_tokens), "sentence-transformers", "\n".join(usage), _WARNING, facts)


def _mcls_card(heads: Collection[str], max_tokens: int, facts: CardFacts) -> str:
    """Of a model that puts `<s>` into long texts, which no other library does."""
    usage = '    from megam3.embedder import M3Embedder\n    M3Embedder(FOLDER).encode(["a text"])'
    note = (
        "\nLong texts are read with `<s>` put in at intervals (`pooling: mcls`), which FlagEmbedding and"
        " sentence-transformers do not do: their vectors of texts longer than one interval differ.\n"
    )
    return _card(_title(heads, max_tokens), "transformers", usage, note, facts)


def _title(heads: Collection[str], max_tokens: int) -> str:
    return f"An M3 retriever ({', '.join(heads).replace('_', '-')}), up to {max_tokens} tokens"


def multi_vector_card(library: str, max_tokens: int, facts: CardFacts) -> str:
    """The card of a folder for `library`: sentence-transformers' MultiVectorEncoder, or PyLate."""
    if library == "PyLate":
        usage = "    from pylate.models import ColBERT\n    ColBERT(FOLDER).encode(TEXTS, is_query=False)"
        note = (
            "\nPyLate leaves `<s>` out of passages only, so a query has one vector more than in"
            " megam3; it sums "
            "the maxima where M3 takes their mean.\n"
        )
    else:
        usage = (
            "    from sentence_transformers import MultiVectorEncoder\n   "
            " MultiVectorEncoder(FOLDER).encode(TEXTS)"
        )
        note = "\nNeeds sentence-transformers 6 or later.\n"
    title = f"The multi-vector head of an M3 retriever, up to {max_tokens} tokens"
    return _card(title, library, usage, note, facts)


def _card(title: str, library: str, usage: str, note: str, facts: CardFacts) -> str:
    head = f"---\nlibrary_name: {library}\npipeline_tag: sentence-similarity\n---\n"
    parts = [f"{head}# {title}\n", f"Trained with megam3 {__version__}.\n\n## Usage\n", f"{usage}\n"]
    if facts.instructions:
        parts.append(_instructions_text(facts.instructions))
    parts.append(note)
    if facts.datasets:
        parts.append(f"\n## Data\n\nTrained on: {', '.join(facts.datasets)}. Checkpoint: {facts.step}.\n")
    if facts.evaluation:
        parts.append("\n## Evaluation\n\n" + "\n".join(_rows(facts.evaluation)) + "\n")
    if facts.recipe_yaml:
        parts.append(f"\n## Recipe\n\n```yaml\n{facts.recipe_yaml.rstrip()}\n```\n")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _instructions_text(instructions: Instructions) -> str:
    query, passage = (json.dumps(text, ensure_ascii=False) for text in instructions.prompts().values())
    return (
        "\n## Instructions\n\n"
        f"The model was trained with `{query}` before queries and `{passage}` before passages. M3Embedder"
        " puts them there in `encode_queries` and `encode_passages`, sentence-transformers in `encode_query`"
        " and `encode_document`; FlagEmbedding takes them as `query_instruction_for_retrieval` and"
        " `passage_instruction_for_retrieval`. `encode` puts nothing.\n"
    )


def _rows(evaluation: Mapping[str, Any]) -> list[str]:
    rows = ["| file | figure | value |", "|---|---|---|"]
    for name, content in evaluation.items():
        rows += [f"| {name} | {key} | {value:.4f} |" for key, value in _numbers(content)]
    return rows


def _numbers(content: Any, prefix: str = "") -> list[tuple[str, float]]:
    if isinstance(content, Mapping):
        return [
            item for key, value in content.items() for item in _numbers(value, f"{prefix}/{key}".strip("/"))
        ]
    is_number = isinstance(content, int | float) and not isinstance(content, bool)
    return [(prefix, float(content))] if is_number else []
