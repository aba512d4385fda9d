"""Queries of a test set with what a model found for them, and the tokens that matched.

find_examples    searches a few queries, evenly spread over the test set, with an exported model
RUN/examples.json        what it found; the page of the run shows it from then on
examples_html    each query: five columns, relevant passages named, matches in colour
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError
from megam3.files import read_json, write_json
from megam3.report.matches import LEGEND, passage_html
from megam3.report.text import safe
from megam3.retrieval.answers import holds_answer
from megam3.retrieval.beir import BeirDataset, read_beir
from megam3.retrieval.corpus import Answer, open_corpus
from megam3.retrieval.index.build import EncodeOptions
from megam3.retrieval.matches import Segment

EXAMPLES_FILE = "examples.json"
INDEX_FOLDER = "examples-index"
SHOWN_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A passage in a ranking."""

    score: float
    is_relevant: bool
    segments: list[Segment]
    """Its text in pieces, with what each contributed."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query and the best passages of each mode."""

    query: str
    language: str
    test_set: str
    modes: dict[str, list[Hit]]


def find_examples(
    model: str, test_set: str, run_folder: Path, *, num_queries: int, num_hits: int, device: str | None = None
) -> list[Example]:
    """Search `num_queries` of a test set; its passages are indexed in `run_folder`, and a second call opens
    that index.

    Raises:
        ConfigError: a number below 1.
        UserError: of the model or the test set.
    """
    for option, value in (("--queries", num_queries), ("--top", num_hits)):
        if value < 1:
            raise ConfigError(option, value, "must be at least 1", "leave it out")
    dataset = read_beir(test_set)
    embedder = M3Embedder(model, device=device)
    limits = EvaluationConfig(query_instruction=embedder.instructions.query)
    corpus = open_corpus(
        embedder,
        model,
        [str(Path(test_set) / "corpus.jsonl")],
        run_folder / INDEX_FOLDER,
        EncodeOptions(
            max_tokens=min(limits.passage_max_tokens, embedder.max_tokens),
            batch_tokens=limits.batch_tokens,
            instruction=embedder.instructions.passage,
            multi_vector=True,
        ),
        limits,
    )
    count = len(dataset.queries)
    chosen = sorted({place * count // num_queries for place in range(num_queries)})
    return [_example(dataset, row, corpus.search(dataset.queries[row], num_hits)) for row in chosen]


def _example(dataset: BeirDataset, row: int, answer: Answer) -> Example:
    grades = dataset.qrels.get(dataset.query_ids[row], {})
    wanted = {passage for passage, grade in grades.items() if grade > 0}
    relevant = {text for name, text in zip(dataset.passage_ids, dataset.passages) if name in wanted}
    answers = (dataset.answers or {}).get(dataset.query_ids[row], [])
    return Example(
        query=dataset.queries[row],
        language=dataset.languages[row],
        test_set=dataset.name,
        modes={
            mode: [
                Hit(
                    score=found.score,
                    is_relevant=found.text in relevant or holds_answer(found.text, answers),
                    segments=answer.segments[found.row],
                )
                for found in ranking
            ]
            for mode, ranking in answer.rankings.items()
        },
    )


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """As RUN/examples.json."""
    write_json(folder / EXAMPLES_FILE, [asdict(example) for example in examples])


def read_examples(folder: Path, notes: list[str]) -> list[Example]:
    """What `write_examples` wrote; none where there is no file. A damaged file becomes a note."""
    path = folder / EXAMPLES_FILE
    if not path.is_file():
        return []
    try:
        return [_parsed(example) for example in read_json(path)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"{EXAMPLES_FILE}: cannot be read ({error})")
        return []


def _parsed(example: dict) -> Example:
    modes = {
        mode: [Hit(**{**hit, "segments": [Segment(**piece) for piece in hit["segments"]]}) for hit in hits]
        for mode, hits in example["modes"].items()
    }
    return Example(**{**example, "modes": modes})


def examples_html(examples: Sequence[Example]) -> str:
    """Every query with its columns."""
    return (LEGEND if examples else "") + "".join(_query_html(example) for example in examples)


def _query_html(example: Example) -> str:
    columns = "".join(
        f"<div><h4>{safe(mode)}</h4>{''.join(_hit_html(*each) for each in enumerate(hits, 1)) or '–'}</div>"
        for mode, hits in example.modes.items()
    )
    where = f"{example.test_set}, {example.language}"
    title = f'<h3>{safe(example.query)} <span class="note">({safe(where)})</span></h3>'
    return f'{title}<div class="modes">{columns}</div>'


def _hit_html(place: int, hit: Hit) -> str:
    # in words as well as by its frame: nothing is told by colour alone
    label = ' <b class="relevant">relevant</b>' if hit.is_relevant else ""
    text = passage_html(hit.segments, SHOWN_CHARACTERS)
    return f'<div class="hit"><span class="score">{place}. {hit.score:.4f}</span>{label} {text}</div>'
