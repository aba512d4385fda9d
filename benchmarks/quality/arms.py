"""Train each arm of a file with several seeds, evaluate what came out, print one table.

    python -m benchmarks.quality.arms ARMS.yaml OUT --encoder FOLDER --tests DIR [DIR …]
        [--data NAME=PATH …] [--arms a,b] [--seeds 0,1,2]

ARMS.yaml:

    base: finetune_base.yaml       # a recipe beside this file
    arms:
      plain:
        overrides: [optim.lr=1e-5, "data.train=[{name: p, paths: [{pairs}]}]"]   # {pairs}: --data pairs=PATH
        merge: [0.3, 0.5]          # also evaluate (1 - s)·start + s·trained
        merge_encoder: [0.5]       # the same, but with the trained heads
      pretrained:
        recipe: pretrain_base.yaml # another base
        format: mlm                # of the export
        once: true                 # one run, of the first seed, for all seeds of the arms that begin there
        evaluate: false
      after:
        start: pretrained          # begins where that arm ended, with the same seed

    OUT/results.jsonl              one line a model and test set; what is there already is not run again
    OUT/exports/ARM-SEED/          the trained models

Every run is a process of its own (a fork: DeepSpeed and torch are imported once), one thread, on the CPU.
Models are evaluated in bf16, like they were trained, unless --precision says otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from ruamel.yaml import YAML

from megam3 import train as training  # first: it tells DeepSpeed of a machine without accelerator
from megam3.checkpoint import consolidated_weights, newest_complete
from megam3.config.schema import EvaluationConfig, ModelConfig
from megam3.embedder import M3Embedder
from megam3.encoders import HEAD_FILES
from megam3.export.bge_m3 import write_bge_m3
from megam3.export.formats import export
from megam3.export.merge import merge_folders
from megam3.model.device import Precision
from megam3.model.pretrained import load_m3
from megam3.retrieval.beir import read_beir
from megam3.retrieval.by_embedder import embedder_encode, embedder_tokenize
from megam3.retrieval.evaluate import evaluate

MODES = ("Dense", "Sparse", "Multi-vec", "Dense+Sparse", "All")
METRIC = "ndcg@10"


class Bench:
    """Where everything lies, and what has been measured already."""

    def __init__(self, given: argparse.Namespace):
        self.out: Path = given.out
        self.tests: list[str] = given.tests
        self.precision: Precision = given.precision
        self.data = dict(entry.split("=", 1) for entry in given.data)
        self.encoder: str = given.encoder
        self.seeds = [int(part) for part in given.seeds.split(",")]
        self.limits = (given.query_max_tokens, given.passage_max_tokens)
        self.results = self.out / "results.jsonl"
        (self.out / "exports").mkdir(parents=True, exist_ok=True)
        self.start = self.out / "exports" / f"start-{Path(given.encoder).name}"
        if not self.start.exists():
            in_fork(lambda: write_start(given.encoder, self.start))

    def rows(self) -> list[dict]:
        """All results so far."""
        if not self.results.exists():
            return []
        return [json.loads(line) for line in self.results.read_text(encoding="utf-8").splitlines()]

    def measure(self, arm: str, seed: int, folder: Path, facts: dict) -> None:
        """Evaluate a model on each test set, unless that was done."""
        done = {(row["arm"], row["seed"], row["test"]) for row in self.rows()}
        for test in self.tests:
            if (arm, seed, Path(test).name) not in done:
                in_fork(partial(self._evaluate, arm, seed, folder, test, facts))

    def _evaluate(self, arm: str, seed: int, folder: Path, test: str, facts: dict) -> None:
        query_tokens, passage_tokens = self.limits
        config = EvaluationConfig(
            folders=[test],
            query_max_tokens=query_tokens,
            passage_max_tokens=passage_tokens,
            rerank_hybrid=200,
        )
        embedder = M3Embedder(str(folder), precision=self.precision)
        began = time.monotonic()
        result = evaluate(
            read_beir(test, "test"), embedder_tokenize(embedder), embedder_encode(embedder), config, MODES
        )
        row = {
            "arm": arm,
            "seed": seed,
            "test": Path(test).name,
            "modes": {mode: round(result.modes[mode].overall[METRIC], 5) for mode in MODES},
            "languages": {
                mode: {lang: round(v[METRIC], 4) for lang, v in result.modes[mode].by_language.items()}
                for mode in MODES
            },
            "evaluation_seconds": round(time.monotonic() - began, 1),
            **facts,
        }
        with open(self.results, "a", encoding="utf-8") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(arm, seed, Path(test).name, row["modes"], f"{row['evaluation_seconds']} s", flush=True)


def in_fork(work: Callable[[], None]) -> None:
    """Run in a child process, so that engines, stores and process groups end with it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"a run ended with code {process.exitcode}; its own message is above")


def write_start(encoder: str, out: Path) -> None:
    """The encoder with the heads that training would begin with, so that the start can be evaluated."""
    model = load_m3(encoder, ModelConfig(path=encoder, missing_heads="init"), dtype=torch.float32)
    out.mkdir()
    write_bge_m3(out, model, Path(encoder))


def train_once(
    recipe: Path, overrides: Sequence[str], runs: Path, name: str, source: Path, out: Path, form: str
) -> None:
    """One run and its export; the checkpoint is removed, since a few of them fill a disk."""
    settings = [*overrides, f"model.path={source}", f"output_dir={runs}", f"name={name}"]
    if code := training.main([str(recipe), *settings]):
        sys.exit(code)
    checkpoint = newest_complete(str(runs / name), print)
    assert checkpoint is not None, "training ended well, so it saved"
    export(consolidated_weights(checkpoint), str(source), str(out), format=form)
    shutil.rmtree(runs / name / "checkpoints")


def run_arm(bench: Bench, name: str, arm: dict, recipe: Path, seed: int) -> None:
    """Train, export, evaluate; then the merges that are asked for."""
    exports = bench.out / "exports"
    out = exports / f"{name}-{seed}"
    if arm.get("once") and seed != bench.seeds[0] and not out.exists():
        out.symlink_to(f"{name}-{bench.seeds[0]}")
    form = arm.get("format", "bge-m3")
    if "start" in arm:
        source = exports / f"{arm['start']}-{seed}"
    else:  # a language-model head, which pretraining goes on with, is in the encoder's folder alone
        source = Path(bench.encoder) if form == "mlm" else bench.start
    recipe = recipe.with_name(arm.get("recipe", recipe.name))
    overrides = [_filled(text, bench.data) for text in arm.get("overrides", [])]
    # arms of the same data share a tokenised store
    settings = [recipe.name, *(each for each in overrides if each.startswith("data."))]
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    overrides += [f"data.store_dir={bench.out / 'stores' / mark}", f"train.seed={seed}"]
    facts: dict = {}
    if not out.exists():
        began = time.monotonic()
        runs = bench.out / "runs"
        shutil.rmtree(runs / f"{name}-{seed}", ignore_errors=True)
        in_fork(lambda: train_once(recipe, overrides, runs, f"{name}-{seed}", source, out, form))
        facts["training_seconds"] = round(time.monotonic() - began, 1)
    for file in HEAD_FILES.values():
        if not (out / file).exists():  # a head that the arm does not train is evaluated as it began
            shutil.copy(bench.start / file, out)
    if arm.get("evaluate", True):
        bench.measure(name, seed, out, facts)
    for kind, begin in (("merge", bench.start), ("merge_encoder", bench.encoder)):
        for share in arm.get(kind, []):
            merged = exports / f"{name}-{kind}-{share}-{seed}"
            shutil.rmtree(merged, ignore_errors=True)
            merge_folders([str(begin), str(out)], merged, [1 - share, share], "average")
            bench.measure(f"{name}, {kind} {share}", seed, merged, {})
            shutil.rmtree(merged)


def _filled(text: str, data: dict[str, str]) -> str:
    for name, path in data.items():
        text = text.replace("{" + name + "}", path)
    return text


def table(rows: Sequence[dict], start: str, test: str) -> str:
    """Mean and standard deviation over seeds, and the mean change against the start of each mode."""
    lines = ["| arm | seeds | " + " | ".join(MODES) + " |", "|---|---|" + "---|" * len(MODES)]
    names = list(dict.fromkeys(row["arm"] for row in rows if row["test"] == test))
    first = next((row["modes"] for row in rows if row["test"] == test and row["arm"] == start), None)
    for name in names:
        mine = [row["modes"] for row in rows if row["test"] == test and row["arm"] == name]
        cells = []
        for mode in MODES:
            values = [modes[mode] for modes in mine]
            mean = statistics.fmean(values)
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            change = f" ({mean - first[mode]:+.4f})" if first and name != start else ""
            cells.append(f"{mean:.4f}{spread}{change}")
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arms_file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--tests", nargs="*", default=[], help="BEIR folders")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--arms", default=None, help="some of the file's (default: all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--query-max-tokens", type=int, default=32)
    parser.add_argument("--passage-max-tokens", type=int, default=96)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    wanted = YAML(typ="safe", pure=True).load(given.arms_file.read_text(encoding="utf-8"))
    bench = Bench(given)
    bench.measure(bench.start.name, 0, bench.start, {})
    recipe = given.arms_file.parent / wanted["base"]
    for seed in bench.seeds:
        for name in given.arms.split(",") if given.arms else wanted["arms"]:
            run_arm(bench, name, wanted["arms"][name] or {}, recipe, seed)
    for test in given.tests:
        print(f"\n{Path(test).name}, {METRIC}\n\n{table(bench.rows(), bench.start.name, Path(test).name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
