"""What is put before a text: e5's `query: ` and `passage: `, a task in words, PyLate's `[Q] ` and `[D] `.

A recipe names them dataset by dataset; an exported folder carries them where sentence-transformers looks, so
that whoever searches with the model asks as it was trained. Free of torch.

    config_sentence_transformers.json   {"prompts": {"query": "query: ", "document": "passage: "}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megam3.model_files import read_model_object

PROMPTS_FILE = "config_sentence_transformers.json"
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
"""Names of a passage's prompt, in the order in which sentence-transformers' encode_document looks for
them."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Put before every text as it stands, the space at its end included; empty: nothing."""

    query: str = ""
    passage: str = ""

    def __bool__(self) -> bool:
        return bool(self.query or self.passage)

    def replaced(self, query: str | None, passage: str | None) -> Instructions:
        """With what a user asks for; None: as it is.

        >>> Instructions(query="query: ", passage="passage: ").replaced("ask: ", None)
        Instructions(query='ask: ', passage='passage: ')
        """
        return Instructions(
            query=self.query if query is None else query, passage=self.passage if passage is None else passage
        )

    def prompts(self) -> dict[str, str]:
        """As sentence-transformers names them; empty without any."""
        return {"query": self.query, "document": self.passage} if self else {}


def read_instructions(folder: str | Path) -> Instructions:
    """Those that a model folder carries: sentence-transformers' prompts, else PyLate's prefixes.

    Raises:
        ConfigError: the file is no JSON object.
    """
    file = Path(folder) / PROMPTS_FILE
    if not file.is_file():
        return Instructions()
    config = read_model_object(file)
    prompts = config.get("prompts") or {}
    passage = next((prompts[name] for name in _PASSAGE_PROMPTS if prompts.get(name)), None)
    return Instructions(
        query=str(prompts.get("query") or config.get("query_prefix") or ""),
        passage=str(passage or config.get("document_prefix") or ""),
    )


def instructions_of(recipe: Mapping[str, Any]) -> Instructions:
    """What queries and passages get outside training: `evaluation`'s where the recipe gives them, else what
    all datasets put there, nothing where they differ. Recipes of earlier versions, without the fields, too.

    >>> train = [{"query_instruction": "query: "}, {"query_instruction": "query: "}]
    >>> instructions_of({"data": {"train": train}, "evaluation": {"passage_instruction": "passage: "}})
    Instructions(query='query: ', passage='passage: ')
    """
    datasets, evaluation = recipe.get("data", {}).get("train", []), recipe.get("evaluation", {})
    shared = {}
    for side in ("query", "passage"):
        distinct = {str(dataset.get(f"{side}_instruction") or "") for dataset in datasets}
        shared[side] = distinct.pop() if len(distinct) == 1 else ""
    return Instructions(**shared).replaced(
        evaluation.get("query_instruction"), evaluation.get("passage_instruction")
    )
