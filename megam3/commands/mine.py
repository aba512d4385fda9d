"""`megam3 mine FILE… --model FOLDER --output OUT.jsonl`: hard negatives for training records.

    megam3 mine pairs.jsonl --model runs/one/export --corpus corpus.jsonl --output mined.jsonl
    megam3 mine pairs.jsonl --model … --output … --candidates sum --ratio 0.95 --range 0-200 --negatives 7

Candidates come from --corpus, or from the passages of the records themselves, ranked by one head or the sum.
Of the ranks in --range, known positives of the query, the query itself and what comes too close to a positive
are taken out; --negatives of the rest are drawn. Killed and started again, it continues. With several
ranks (srun, torchrun) each encodes and mines its share: slurm/mine.sh.

Coming from FlagEmbedding's hn_mine: input_file = FILE, output_file = --output, candidate_pool = --corpus,
range_for_sampling = --range, negative_number = --negatives, embedder_name_or_path = --model,
embedder_query_max_length = --query-max-tokens, embedder_passage_max_length = --passage-max-tokens,
query_instruction_for_retrieval = --query-instruction, use_gpu_for_searching = --dense-search torch.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from megam3.commands.instruction_options import add_instruction_options, given_instructions
from megam3.dist import comm
from megam3.dist.session import device_of_rank, worker_ranks
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError
from megam3.model.folder import model_folder
from megam3.retrieval.index.build import EncodeOptions
from megam3.retrieval.index.nearest import DENSE_SEARCHES
from megam3.retrieval.index.search import RANK_BY, SearchOptions
from megam3.retrieval.mining.report import report_table
from megam3.retrieval.mining.run import MiningOptions, mine
from megam3.retrieval.mining.select import SelectOptions


def main(argv: Sequence[str]) -> int:
    """Mine, and print the report.

    Raises:
        UserError: see `megam3.retrieval.mining.run.mine`.
    """
    given = _parser().parse_args(argv)
    select = _select_options(given)
    select.check()
    with worker_ranks() as ranks:
        folder = model_folder(given.model)
        embedder = M3Embedder(folder, device=device_of_rank(given.device, ranks))
        options = _mining_options(given, select, folder, str(embedder.device))
        report = mine(embedder, options, progress_lines(comm.is_main()))
        if comm.is_main():
            Console().print(report_table(report))
            output = options.output
            print(f"{output}; its report: {output}.report.json; pool and index: {options.work}")
    return 0


def _select_options(given: argparse.Namespace) -> SelectOptions:
    low, high = parse_range(given.range)
    return SelectOptions(
        low=low,
        high=high,
        negatives=given.negatives,
        margin=given.margin,
        ratio=given.ratio,
        max_score=given.max_score,
        min_score=given.min_score,
        positive_score=given.positive_score,
        sample=given.sample,
        seed=given.seed,
    )


def _mining_options(
    given: argparse.Namespace, select: SelectOptions, folder: str, device: str
) -> MiningOptions:
    """What the command line says, for the model in `folder`."""
    search = SearchOptions(
        by=given.candidates, depth=select.high, dense_search=given.dense_search, device=device
    )
    instructions = given_instructions(given, folder)
    return MiningOptions(
        inputs=tuple(given.files),
        output=Path(given.output),
        work=Path(given.work or f"{Path(given.output)}.work"),
        corpus=tuple(given.corpus),
        model=folder,
        search=search,
        select=select,
        encode=EncodeOptions(
            max_tokens=given.passage_max_tokens,
            batch_tokens=given.batch_tokens,
            instruction=instructions.passage,
            dense_dtype=given.dense_dtype,
            lexical=search.needs_lexical,
            multi_vector=search.needs_multi_vector,
        ),
        query_max_tokens=given.query_max_tokens,
        query_instruction=instructions.query,
        with_scores=not given.no_scores,
        keep_negatives=given.keep_negatives,
    )


def progress_lines(shown: bool) -> Callable[[str, int, int], None]:
    """A reporter that prints one line a step on stderr, on the rank that speaks."""

    def report(what: str, done: int, total: int) -> None:
        if shown:
            print(f"{what}: {done} of {total} on this rank", file=sys.stderr, flush=True)

    return report


def parse_range(text: str) -> tuple[int, int]:
    """(low, high) of `LOW-HIGH`.

    Raises:
        ConfigError: not two numbers.
    """
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if found is None:
        raise ConfigError(
            "--range", text, "must be two ranks, the lower first", "write LOW-HIGH, e.g. 10-210"
        )
    return int(found[1]), int(found[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megam3 mine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="training records: files, folders or globs")
    add("--model", required=True, help="exported folder (or hub id) that encodes queries and passages")
    add("--output", required=True, help="JSONL to write")
    add("--corpus", nargs="+", default=[], metavar="FILE", help='passages: {"text"}, or a BEIR folder')
    add("--work", default=None, help="folder of pool, index and parts (default: OUTPUT.work)")
    add("--candidates", choices=RANK_BY, default="dense", help="what ranks them (default: %(default)s)")
    add("--range", default="10-210", metavar="LOW-HIGH", help="ranks (default: 10-210)")
    add("--negatives", type=int, default=15, help="for each query (default: %(default)s)")
    add("--sample", choices=["random", "first"], default="random", help="draw them, or take the hardest")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add("--margin", type=float, default=None, help="take out scores above the positive's minus this")
    add(
        "--ratio",
        type=float,
        default=None,
        help="take out scores above this share of the positive's; try 0.95",
    )
    add("--max-score", type=float, default=None, help="take out scores above this")
    add("--min-score", type=float, default=None, help="take out scores below this")
    add("--positive-score", choices=["min", "max"], default="min", help="which positive's score counts")
    add("--no-scores", action="store_true", help="write no pos_scores and neg_scores")
    add("--keep-negatives", action="store_true", help="keep those a record has, before the mined ones")
    add_instruction_options(parser, " without a prompt of its own")
    add("--query-max-tokens", type=int, default=512)
    add("--passage-max-tokens", type=int, default=512)
    add("--batch-tokens", type=int, default=None, help="encoded at a time (default: by device)")
    add("--dense-search", choices=DENSE_SEARCHES, default="faiss", help="faiss and torch are exact")
    add("--dense-dtype", choices=["float16", "float32"], default="float16", help="of vectors on disk")
    add("--device", default=None, help="default: CUDA when there is one")
    return parser
