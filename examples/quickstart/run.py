"""Fetch real text, train, evaluate, export and query a small retriever, with the tools a large run uses.

    make quickstart                      in a fresh clone
    megam3 quickstart                    in the environment it makes
    python examples/quickstart/run.py    in any environment with megam3's requirements

runs/quickstart/          the run folder; training continues from its checkpoint when it was interrupted
    start/                corpus, tokenizer and untrained encoder
    export/               the Hugging Face folder
    eval/heldout.json     five modes and BM25 on pages no model has seen
    report.html           the run as one page
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# as a script, Python's path begins with this folder: megam3 and examples are found from the top of the
# checkout
sys.path.insert(0, str(ROOT))

from megam3.dist.env import prepare_environment

# DeepSpeed, which reads the checkpoint, looks for an accelerator while it is imported
prepare_environment(os.environ)

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from examples.quickstart.prepare import Prepared, prepare
from megam3.checkpoint import consolidated_weights, newest_complete
from megam3.cli import report_user_errors
from megam3.commands.report import PAGE_FILE, write_page
from megam3.config.load import load_config
from megam3.config.schema import RunConfig
from megam3.dist.env import free_port
from megam3.embedder import M3Embedder
from megam3.errors import TrainingError
from megam3.export.bge_m3 import export_bge_m3
from megam3.model.m3 import represent
from megam3.obs.log import setup_logging
from megam3.packed_texts import pack_texts
from megam3.report.page import page
from megam3.report.record import read_run
from megam3.retrieval.beir import BeirDataset, read_beir
from megam3.retrieval.by_embedder import embedder_encode, embedder_tokenize
from megam3.retrieval.evaluate import evaluate
from megam3.retrieval.results import overall_table
from megam3.scoring.combine import score_heads

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).with_name("quickstart.yaml")
NUM_RANKS = 2
NUM_EXAMPLES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it; the exit code."""
    parser = argparse.ArgumentParser(
        prog="megam3 quickstart",
        description="Train, evaluate, export and query a small retriever on real text.",
    )
    parser.add_argument(
        "--data",
        default=None,
        help='your own pairs, JSONL of {"query": …, "pos": […]}; without it: GNOME\'s help pages',
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe, as in training"
    )
    given = parser.parse_args(argv)
    setup_logging(None, is_main=True)
    disable_progress_bar()
    started = time.monotonic()
    name = "quickstart" if given.data is None else f"quickstart-{Path(given.data).stem}"
    config = load_config(RECIPE, [f"name={name}", *given.overrides])
    run_dir = Path(config.output_dir) / config.name
    prepared = prepare(run_dir / "start", given.data, cache=run_dir.parent / "cache")
    train(config, prepared, [f"name={name}", *given.overrides])
    export = export_newest(run_dir, prepared)
    show(config, run_dir, prepared, export, time.monotonic() - started)
    return 0


def train(config: RunConfig, prepared: Prepared, overrides: Sequence[str]) -> None:
    """Start the ranks with DeepSpeed's launcher, as for a large run.

    Raises:
        TrainingError: training ended with another exit code than 0.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        str(launcher),
        "--quiet",
        "--num_accelerators",
        str(NUM_RANKS),
        "--master_port",
        str(free_port()),
    ]
    command += ["--module", "megam3.train", str(RECIPE), *overrides]
    command += [
        f"model.path={prepared.encoder_folder}",
        f"data.train.0.paths=[{prepared.train_file}]",
        f"evaluation.folders=[{prepared.heldout_folder}]",
    ]
    logger.info("%s", " ".join(command))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    code = subprocess.run(command, env={"DS_ACCELERATOR": "cpu", **os.environ, "PYTHONPATH": path}).returncode
    if code != 0:
        raise TrainingError(
            "quickstart training",
            code,
            "must end with exit code 0",
            f"see {Path(config.output_dir) / config.name / 'log.txt'}",
        )


def export_newest(run_dir: Path, prepared: Prepared) -> Path:
    """The newest checkpoint as run_dir/export, replacing an earlier export."""
    checkpoint = newest_complete(str(run_dir), logger.warning)
    assert checkpoint is not None, "training ended well, so it saved"
    export = run_dir / "export"
    shutil.rmtree(export, ignore_errors=True)
    differences = export_bge_m3(consolidated_weights(checkpoint), str(prepared.encoder_folder), export)
    logger.info("exported %s; read back, it differs by at most %.1e", export, max(differences.values()))
    return export


def show(config: RunConfig, run_dir: Path, prepared: Prepared, export: Path, seconds: float) -> None:
    """Evaluate the exported folder, answer queries from it, and say where everything lies."""
    console, embedder = Console(), M3Embedder(str(export))
    dataset = read_beir(str(prepared.heldout_folder), config.evaluation.split)
    result = evaluate(dataset, embedder_tokenize(embedder), embedder_encode(embedder), config.evaluation)
    result.write(run_dir / "eval" / "heldout.json")
    write_page(run_dir / PAGE_FILE, page([read_run(run_dir)]))
    console.print(overall_table([result]))
    console.print(answers(embedder, dataset, config))
    places = {
        "run folder": run_dir,
        "exported model": export,
        "evaluation": run_dir / "eval" / "heldout.json",
        "held-out pages": prepared.heldout_folder,
        "report": run_dir / PAGE_FILE,
    }
    for what, place in places.items():
        console.print(f"{what:15} {place}", soft_wrap=True)
    num_languages = len(set(dataset.languages))
    console.print(
        f"{result.num_queries} queries in {num_languages} languages over {result.num_passages} passages; "
        f"{seconds / 60:.1f} minutes before this table"
    )


def answers(embedder: M3Embedder, dataset: BeirDataset, config: RunConfig) -> Table:
    """The best passage by all three heads for one query in each of three languages."""
    chosen = [dataset.languages.index(language) for language in dict.fromkeys(dataset.languages)][
        :NUM_EXAMPLES
    ]
    tokenize, limits = embedder_tokenize(embedder), config.evaluation
    query_ids = tokenize([dataset.queries[i] for i in chosen], limits.query_max_tokens)
    with torch.no_grad():
        queries = represent(embedder.model, pack_texts(query_ids).to(embedder.device))
    scores_QP = torch.zeros(len(chosen), len(dataset.passages))
    for columns, passages in embedder.represent_ids(
        tokenize(dataset.passages, limits.passage_max_tokens), batch_tokens=limits.batch_tokens
    ):
        scores_QP[:, columns] = score_heads(queries, passages, limits.weights).by_name()["sum"].cpu()
    table = Table(
        "language",
        "query",
        "best passage",
        "right",
        title="answers from the exported folder",
        title_justify="left",
    )
    for row, index in enumerate(chosen):
        best = int(scores_QP[row].argmax())
        relevant = dataset.qrels[dataset.query_ids[index]]
        right = "yes" if relevant.get(dataset.passage_ids[best], 0) > 0 else "no"
        table.add_row(
            dataset.languages[index],
            dataset.queries[index],
            dataset.passages[best][:100].replace("\n", " "),
            right,
        )
    return table


if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
