"""Index texts with an exported model and query them: five retrieval modes side by side.

    megam3 search runs/one/export pages.jsonl                      asks for queries, one a line
    megam3 search runs/one/export pages.jsonl --query "big fonts"  one query; --json for programs
    megam3 search runs/one/export pages.jsonl --serve              a page at http://127.0.0.1:8765/

FILE holds {"text"} records (BEIR's corpus.jsonl as well), or training records, whose passages are taken. The
index lies in FILE.index; a second call opens it, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megam3.commands.instruction_options import add_instruction_options, given_instructions
from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError
from megam3.model.folder import model_folder
from megam3.report.search_server import LOOPBACK, SearchServer, answer_json, is_loopback
from megam3.retrieval.corpus import Answer, Corpus, open_corpus
from megam3.retrieval.index.build import EncodeOptions

PORT = 8765
SHOWN_CHARACTERS = 240


def main(argv: Sequence[str]) -> int:
    """Index, then answer.

    Raises:
        UserError: of the model, the files, the index or the address.
    """
    given = _parser().parse_args(argv)
    for option, value, least in (
        ("--top", given.top, 1),
        ("--rerank", given.rerank, 1),
        ("--query-max-tokens", given.query_max_tokens, 3),
        ("--max-tokens", given.max_tokens, 3),
    ):
        if value < least:
            raise ConfigError(option, value, f"must be at least {least}", "leave it out")
    corpus = _corpus(given)
    if given.serve:
        _serve(corpus, given)
        return 0
    console = Console()
    for query in given.query or _typed():
        answer = corpus.search(query, given.top)
        if given.json:
            print(json.dumps(answer_json(answer), ensure_ascii=False), flush=True)
        else:
            print_answer(console, answer)
    return 0


def _corpus(given: argparse.Namespace) -> Corpus:
    folder = model_folder(given.model)
    index = Path(given.index).expanduser() if given.index else Path(f"{given.files[0].rstrip('/')}.index")
    instructions = given_instructions(given, folder)
    return open_corpus(
        M3Embedder(folder, device=given.device),
        folder,
        given.files,
        index,
        EncodeOptions(
            max_tokens=given.max_tokens,
            batch_tokens=given.batch_tokens,
            instruction=instructions.passage,
            multi_vector=not given.no_multi_vector,
        ),
        EvaluationConfig(
            query_max_tokens=given.query_max_tokens,
            query_instruction=instructions.query,
            rerank_dense=given.rerank,
            rerank_hybrid=given.rerank,
        ),
        lambda what, done, total: print(f"{what}: {done} of {total}", file=sys.stderr, flush=True),
    )


def _typed() -> Iterator[str]:
    """Queries from stdin: asked for on a terminal, else one a line."""
    while True:
        if sys.stdin.isatty():
            print("query (Ctrl-D ends): ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def print_answer(console: Console, answer: Answer) -> None:
    """A row a place, a column a mode; words that matched are bold (lexical) or underlined (multi-vector)."""
    table = Table(title=Text(answer.query), title_justify="left", show_lines=True)
    table.add_column("")
    for mode in answer.rankings:
        table.add_column(mode, ratio=1, overflow="fold")
    for place in range(max(map(len, answer.rankings.values()))):
        cells = [Text(str(place + 1))]
        for ranking in answer.rankings.values():
            cells.append(
                _cell(answer, ranking[place].row, ranking[place].score) if place < len(ranking) else Text("–")
            )
        table.add_row(*cells)
    console.print(table)


def _cell(answer: Answer, row: int, score: float) -> Text:
    text = Text(f"{score:.3f} ")
    for segment in answer.segments[row]:
        style = f"{'bold ' if segment.lexical > 0 else ''}{'underline' if segment.multi_vector > 0 else ''}"
        text.append(segment.text.replace("\n", " "), style.strip())
    text.truncate(SHOWN_CHARACTERS, overflow="ellipsis")
    return text


def _serve(corpus: Corpus, given: argparse.Namespace) -> None:
    server = SearchServer(
        corpus, title=f"Search {given.files[0]}", num_hits=given.top, host=given.host, port=given.port
    )
    if not is_loopback(given.host):
        print(f"{given.host}: everyone who reaches this address can query the texts", file=sys.stderr)
    print(f"{server.address} (Ctrl-C ends it)", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    defaults = EvaluationConfig()
    parser = argparse.ArgumentParser(
        prog="megam3 search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="exported folder, or the id of one on the Hugging Face hub")
    add("files", nargs="+", metavar="FILE", help="JSONL, Parquet or Arrow files, folders or globs of texts")
    add("--query", action="append", default=[], help="ask this and end; may be given several times")
    add("--top", type=int, default=5, help="passages shown for each mode (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object a query instead of a table")
    add("--serve", action="store_true", help="serve a page instead of asking here")
    add("--host", default=LOOPBACK, help="address to serve on (default: %(default)s, this machine alone)")
    add("--port", type=int, default=PORT, help="port to serve on; 0: any (default: %(default)s)")
    add("--index", default=None, help="folder of the index (default: FILE.index)")
    add("--no-multi-vector", action="store_true", help="a smaller index; candidates are encoded again")
    add("--rerank", type=int, default=100, help="candidates ranked again (default: %(default)s)")
    add("--max-tokens", type=int, default=8192, help="passages are cut there (default: %(default)s)")
    add("--query-max-tokens", type=int, default=defaults.query_max_tokens)
    add("--batch-tokens", type=int, default=None, help="encoded at a time (default: by device)")
    add_instruction_options(parser)
    add("--device", default=None, help="default: CUDA when there is one")
    return parser
