"""Passages judged by whether they hold an answer, as open-domain question answering does (MKQA, arXiv
2007.15207; DPR, arXiv 2004.04906): for test sets without judgements of passages.

An answer matches as a run of whole words, after Unicode NFKC and case folding:

>>> holds_answer("Paris, the capital of France.", ["paris"]), holds_answer("Parisian life", ["paris"])
(True, False)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> str:
    """Words and signs of a text, folded, each between single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return f" {' '.join(_WORD.findall(folded))} "


def holds_answer(passage: str, answers: Iterable[str]) -> bool:
    """Whether any of the answers stands in the passage; an answer without words never does."""
    read = words_of(passage)
    return any(wanted.strip() and wanted in read for wanted in map(words_of, answers))


def answer_qrels(
    answers: Mapping[str, Sequence[str]],
    rankings: Mapping[str, Sequence[str]],
    passages: Mapping[str, str],
) -> dict[str, dict[str, int]]:
    """Judgements of one mode's rankings: query -> {its first passage that holds an answer: 1}, or {"": 1}
    where none does, so that the query counts as 0.

    With one relevant passage a query, Recall@100 is the share of queries with an answer in the first hundred,
    the figure that MKQA's results are given in, MRR@10 is that of the first answer, and nDCG@10 that of a
    single relevant passage.
    """
    qrels = {}
    for query, wanted in answers.items():
        holders = (p for p in rankings.get(query, ()) if holds_answer(passages[p], wanted))
        qrels[query] = {next(holders, ""): 1}
    return qrels
