"""TREC run files: `query-id Q0 passage-id rank score tag`, one line a result, for trec_eval and its
relatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megam3.errors import DataError
from megam3.files import atomic_file


def write_trec_run(path: str | Path, results: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Write query id → passage id → score, best first, ranks from 1; equal scores are ordered by passage id.

    Raises:
        DataError: an id or the tag is empty or holds white space, which ends a field of the format.
    """
    lines = []
    for query, scores in results.items():
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        for rank, (passage, score) in enumerate(ranked, 1):
            for name, value in (("query id", query), ("passage id", passage), ("tag", tag)):
                if len(value.split()) != 1 or value.split()[0] != value:
                    raise DataError(f"{path} {name}", value, "must be one word", "replace its white space")
            lines.append(f"{query} Q0 {passage} {rank} {score:.9g} {tag}\n")
    with atomic_file(path, "w") as stream:
        stream.writelines(lines)
