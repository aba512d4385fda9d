"""Published test sets, brought into BEIR format once: `beir/NAME`, `miracl/LANG`, `mldr/LANG`, `mkqa/LANG`.

    folder = fetch_benchmark("miracl/sw", cache)      cache/miracl-sw/{corpus,queries}.jsonl, qrels/dev.tsv

The files come from the hub's dataset repositories as they lie there (no loading script runs: since its
version 4 the `datasets` library runs none either, so huggingface_hub, which is needed anyway, downloads
them). With `source`, they are read from copies below that folder instead, in the same tree, OWNER/NAME/…: for
machines without a network.

MKQA judges a passage by whether it holds an answer (arXiv 2007.15207; the M3 paper, section 4.2): its queries
keep their `answers`, and there are no qrels.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from huggingface_hub import snapshot_download
from pyarrow import parquet

from megam3.errors import ConfigError, DataError
from megam3.files import atomic_folder, parse_json
from megam3.retrieval.beir import MAX_LINE_CHARACTERS

DEFAULT_CACHE = Path("~/.cache/megam3/benchmarks")
_PARQUET_ROWS = 4096
_NAME = re.compile(r"^[\w.-]+$")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where files come from."""

    local: Path | None
    """None: the hub."""

    def files(self, repository: str, *patterns: str) -> list[Path]:
        """Files of a dataset repository that match the first pattern that any does, sorted; at least one.

        Raises:
            ConfigError: the hub is not reached or refuses, or no such file.
        """
        folder = self.local / repository if self.local else self._download(repository, patterns)
        found = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), None)
        if found is None:
            rule = f"has no {' or '.join(patterns)}"
            remedy = "check the benchmark's name and the split"
            raise ConfigError("benchmark", str(folder if self.local else repository), rule, remedy)
        return found

    @staticmethod
    def _download(repository: str, patterns: Sequence[str]) -> Path:
        try:
            return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns)))
        # each HTTP library under huggingface_hub has connection errors of its own
        except Exception as error:
            rule = f"cannot be downloaded from the hub ({type(error).__name__})"
            remedy = (
                f"check the network; or copy the repository elsewhere, to DIR/{repository}, and give "
                "--benchmark-source DIR"
            )
            raise ConfigError("benchmark", repository, rule, remedy) from None


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What becomes a folder in BEIR format."""

    passages: Iterable[dict]
    queries: Iterable[dict]
    qrels: Iterable[tuple[str, str, int]]


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
        yield from _text_lines(cast(IO[bytes], raw))


def _text_lines(raw: IO[bytes]) -> Iterator[str]:
    """Lines that hold something; a line is read, not the file: a small archive may open to a large one."""
    file = io.TextIOWrapper(raw, encoding="utf-8")
    while line := file.readline(MAX_LINE_CHARACTERS + 1):
        if len(line) > MAX_LINE_CHARACTERS:
            raise ValueError(f"a line has more than {MAX_LINE_CHARACTERS} characters")
        if line.strip():
            yield line.rstrip("\r\n")


def _records(paths: Iterable[Path]) -> Iterator[dict]:
    for path in paths:
        if path.suffix == ".parquet":
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=_PARQUET_ROWS):
                yield from batch.to_pylist()
            continue
        for line in _lines(path):
            yield parse_json(line)


def _fields(path: Path, count: int) -> Iterator[list[str]]:
    """Tab-separated fields; a header line is left out.

    Raises:
        DataError: a line with another number of fields.
    """
    for number, line in enumerate(_lines(path), 1):
        fields = line.split("\t")
        if len(fields) != count:
            rule = f"needs {count} fields separated by tabs"
            raise DataError(f"{path}:{number}", line[:80], rule, "fetch the file again")
        if fields[-1].strip() != "score":
            yield fields


def _passage(record: dict, key: str) -> dict:
    return {"_id": str(record[key]), "title": record.get("title") or "", "text": record["text"]}


def _beir(source: _Source, name: str, split: str) -> _Parts:
    qrels = source.files(f"BeIR/{name}-qrels", f"{split}.tsv")[0]
    return _Parts(
        passages=_records(_beir_files(source, name, "corpus")),
        queries=_records(_beir_files(source, name, "queries")),
        qrels=((query, passage, int(grade)) for query, passage, grade in _fields(qrels, 3)),
    )


def _beir_files(source: _Source, name: str, part: str) -> list[Path]:
    """The repositories held JSON lines at first and hold Parquet files since; `_id`, `title`, `text` in
    both."""
    return source.files(f"BeIR/{name}", f"{part}/{part}-*.parquet", f"{part}.jsonl*")


def _miracl(source: _Source, language: str, split: str) -> _Parts:
    root = f"miracl-v1.0-{language}"
    corpus = source.files("miracl/miracl-corpus", f"miracl-corpus-v1.0-{language}/*.jsonl.gz")
    topics = source.files("miracl/miracl", f"{root}/topics/topics.{root}-{split}.tsv")[0]
    qrels = source.files("miracl/miracl", f"{root}/qrels/qrels.{root}-{split}.tsv")[0]
    return _Parts(
        passages=(_passage(record, "docid") for record in _records(corpus)),
        queries=({"_id": query, "text": text, "lang": language} for query, text in _fields(topics, 2)),
        qrels=((query, passage, int(grade)) for query, _, passage, grade in _fields(qrels, 4)),
    )


def _mldr(source: _Source, language: str, split: str) -> _Parts:
    root = f"mldr-v1.0-{language}"
    corpus = source.files("Shitao/MLDR", f"{root}/corpus.jsonl.gz")
    rows = list(_records(source.files("Shitao/MLDR", f"{root}/{split}.jsonl.gz")))
    return _Parts(
        passages=(_passage(record, "docid") for record in _records(corpus)),
        queries=({"_id": str(r["query_id"]), "text": r["query"], "lang": language} for r in rows),
        # its negatives are judged, too: grade 0
        qrels=(
            (str(row["query_id"]), str(passage["docid"]), grade)
            for row in rows
            for key, grade in (("positive_passages", 1), ("negative_passages", 0))
            for passage in row.get(key) or ()
        ),
    )


def _mkqa(source: _Source, language: str, split: str) -> _Parts:
    archive = source.files("Shitao/bge-m3-data", "MKQA_test-data.zip")[0]
    return _Parts(
        passages=_records(_beir_files(source, "nq", "corpus")),
        queries=_mkqa_queries(archive, language),
        qrels=(),
    )


def _mkqa_queries(archive: Path, language: str) -> Iterator[dict]:
    with zipfile.ZipFile(archive) as files:
        names = [name for name in files.namelist() if Path(name).name == f"{language}.jsonl"]
        if not names:
            held = ", ".join(sorted(Path(name).stem for name in files.namelist() if name.endswith(".jsonl")))
            raise ConfigError("benchmark", f"mkqa/{language}", "is not in the archive", f"it holds {held}")
        with files.open(names[0]) as raw:
            for line in _text_lines(raw):
                record = parse_json(line)
                yield {
                    "_id": str(record["id"]),
                    "text": record["question"],
                    "lang": language,
                    "answers": [str(answer) for answer in record["answers"]],
                }


_Reader = Callable[[_Source, str, str], _Parts]


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Test sets of one form."""

    read: _Reader
    split: str
    """The one that is published (MIRACL's test judgements are not)."""
    parts: frozenset[str]
    """Languages it is published in; empty: any name may be tried."""


def _languages(names: str) -> frozenset[str]:
    return frozenset(names.split())


_FAMILIES = {
    "beir": _Family(read=_beir, split="test", parts=frozenset()),
    # arXiv 2210.09984, the two surprise languages included
    "miracl": _Family(
        read=_miracl,
        split="dev",
        parts=_languages("ar bn de en es fa fi fr hi id ja ko ru sw te th yo zh"),
    ),
    # arXiv 2402.03216, appendix B.2
    "mldr": _Family(read=_mldr, split="test", parts=_languages("ar de en es fr hi it ja ko pt ru th zh")),
    # arXiv 2007.15207
    "mkqa": _Family(
        read=_mkqa,
        split="test",
        parts=_languages(
            "ar da de en es fi fr he hu it ja km ko ms nl no pl pt ru sv th tr vi zh_cn zh_hk zh_tw"
        ),
    ),
}


def benchmark_split(name: str) -> str:
    """The split that results are published on.

    Raises:
        ConfigError: no such family of benchmarks, or not in this language.
    """
    return _family(name).split


def _family(name: str) -> _Family:
    family, slash, part = name.partition("/")
    if family not in _FAMILIES or not slash or not _NAME.match(part):
        rule = f"must be FAMILY/NAME with a family among {', '.join(_FAMILIES)}"
        raise ConfigError("benchmark", name, rule, "for example miracl/sw, mldr/de, mkqa/fr or beir/scifact")
    known = _FAMILIES[family].parts
    if known and part not in known:
        rule = f"{family} is published in {', '.join(sorted(known))}"
        raise ConfigError("benchmark", name, rule, "use one of these codes")
    return _FAMILIES[family]


def fetch_benchmark(
    name: str, cache: str | Path = DEFAULT_CACHE, split: str | None = None, source: str | Path | None = None
) -> Path:
    """The folder in BEIR format, made on first use; memory does not grow with the corpus.

    Args:
        split: None: the published one.
        source: folder of local copies, OWNER/NAME/… as on the hub; None: the hub.

    Raises:
        ConfigError: an unknown name or split, or the hub is not reached.
        DataError: a file that is not in the published format.
    """
    chosen = _family(name)
    folder = Path(cache).expanduser() / name.replace("/", "-")
    split = split or chosen.split
    if (folder / "qrels" / f"{split}.tsv").exists():
        return folder
    if folder.exists():
        folder = folder.with_name(f"{folder.name}-{split}")
        if folder.exists():
            return folder
    family, _, part = name.partition("/")
    try:
        parts = chosen.read(_Source(local=Path(source).expanduser() if source else None), part, split)
        _write(parts, folder, split)
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError | DataError):
            raise
        rule = f"is not in the format that {family} is published in ({type(error).__name__}: {error})"
        raise DataError("benchmark", name, rule, "fetch its files again") from error
    return folder


def _write(parts: _Parts, folder: Path, split: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as aside:
        (aside / "qrels").mkdir()
        for file, records in (("corpus", parts.passages), ("queries", parts.queries)):
            with (aside / f"{file}.jsonl").open("w", encoding="utf-8") as stream:
                for record in records:
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        with (aside / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as stream:
            stream.write("query-id\tcorpus-id\tscore\n")
            for query, passage, grade in parts.qrels:
                stream.write(f"{query}\t{passage}\t{grade}\n")
