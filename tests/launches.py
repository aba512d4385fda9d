"""Calls of `megam3.train` as a user makes them, and small runs to call it with.

    run_ranks(train_calls, 2, [{"name": "first", "arguments": ["recipe.yaml",
    "train.steps=2"]}])[0]["first"]["code"] == 0

Several calls share one process (or one set of ranks), since starting one costs more than a tiny run; `launch`
starts DeepSpeed's launcher.
"""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megam3.dist.env import free_port
from megam3.obs.metrics import read_metrics
from tests.factory import make_sentences, make_tiny_model_folder

ROOT = Path(__file__).resolve().parents[1]
NUM_RECORDS = 40
STEPS_PER_EPOCH = NUM_RECORDS // 8

RECIPE = """\
name: run
output_dir: {folder}/runs
model:
  path: {folder}/model
data:
  train: [{{name: pairs, paths: ["{folder}/pairs.jsonl"]}}]
  batch: {{global_queries: 8}}
  query_max_tokens: 24
  passage_max_tokens: 40
  passages_per_query: 3
  store_dir: {folder}/store
optim: {{lr: 1.0e-3}}
train: {{steps: 4, log_every_steps: 1}}
evaluation: {{query_max_tokens: 24, passage_max_tokens: 40}}
"""

HELD = """
import os, sys, time
from megam3 import train, trainer

original = trainer.run_step
def run_step(run, batches, progress, wishes, *waited):
    while progress.step >= int(os.environ["HELD_AT"]) and os.path.exists(os.environ["HELD_WHILE"]):
        time.sleep(0.05)
    return original(run, batches, progress, wishes, *waited)

trainer.run_step = run_step
sys.exit(train.main())
"""
"""A program whose run stands still from step HELD_AT on while the file HELD_WHILE is there: what is done to
it finds it there, however long the machine holds up whoever does it."""


@dataclass(frozen=True)
class Workplace:
    """A folder with a tiny model with dropout, pairs (some without negatives, some too long), a test set, and
    a recipe for them."""

    folder: Path

    @property
    def recipe(self) -> str:
        return str(self.folder / "recipe.yaml")

    def run(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / name

    def rows(self, name: str) -> list[dict]:
        """Logged training steps of a run."""
        return [row for row in read_metrics(self.run(name) / "metrics.jsonl") if "loss/total" in row]

    def figures(self, name: str) -> list[dict]:
        """Those figures of a run that do not depend on the machine's speed."""
        unlike = ("speed/", "memory/")
        return [
            {key: value for key, value in row.items() if not key.startswith(unlike)}
            for row in self.rows(name)
        ]


def make_workplace(folder: Path) -> Workplace:
    """See Workplace."""
    make_tiny_model_folder(folder / "model", dropout=0.1)
    short = make_sentences(5 * NUM_RECORDS)
    long = make_sentences(NUM_RECORDS, seed=1, min_words=20, max_words=30)
    records = []
    for row in range(NUM_RECORDS):
        negatives = short[2 * NUM_RECORDS + row :: NUM_RECORDS][: row % 3]
        positive = long[row] if row % 5 == 0 else short[NUM_RECORDS + row]
        records.append({"query": short[row], "pos": [f"{short[row]} {positive}"], "neg": negatives})
    write_jsonl(folder / "pairs.jsonl", records)
    write_jsonl(
        folder / "beir" / "corpus.jsonl",
        [{"_id": f"d{i}", "title": "", "text": records[i]["pos"][0]} for i in range(12)],
    )
    write_jsonl(
        folder / "beir" / "queries.jsonl", [{"_id": f"q{i}", "text": records[i]["query"]} for i in range(5)]
    )
    (folder / "beir" / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(5))]
    (folder / "beir" / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return Workplace(folder)


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """One JSON line per record; a string is written as it stands."""

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    )
    return path


def train_calls(calls: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
    """Run on a rank of `run_ranks`: `megam3.train.main(arguments)` per call; by the call's name its exit
    `code` and all it `said`.

    A call may name a `signal` = (rank, step, signal name) that the rank sends itself before it takes the
    step, a file to `damage` beforehand, and a run folder to `record`: [time of writing, contents] of its
    descriptions before and after, as `records`. `poison` names places of the plan whose gradient is NaN on
    the main rank, `dies_at` one at which the call ends like a killed one, and `killed_at` one at which the
    process kills itself. The `rows` that each step of
    this rank was given come back as well.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # never used: the group is there already
    from megam3 import train  # a fresh process picks its accelerator while this is imported

    # DeepSpeed remembers the groups of its first engine: all calls of a process share them
    with mock.patch.object(train.comm, "stop"), mock.patch.object(train.comm, "leave"):
        return {call["name"]: _call(train.main, call) for call in calls}


def train_calls_in_fp16(calls: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
    """`train_calls` also where the CPU has no instructions for fp16: torch computes it all the same, slowly,
    but DeepSpeed asks for them."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True):
        return train_calls(calls)


def _call(main: Any, call: Mapping[str, Any]) -> dict:
    said, rows = io.StringIO(), list[list[int]]()
    if call.get("damage"):
        Path(call["damage"]).write_bytes(b"damaged")
    before = _descriptions(call.get("record", ""))
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), _disturbed(call, rows):
        try:
            code = main([str(argument) for argument in call["arguments"]])
        except Exception:
            code = 1
            traceback.print_exc()
    records = (before, _descriptions(call.get("record", "")))
    return {"code": code, "said": said.getvalue(), "records": records, "rows": rows}


def _descriptions(run: str) -> dict[str, list]:
    paths = [Path(run) / name for name in ("recipe.yaml", "ds_config.json", "env.json")] if run else []
    return {path.name: [path.stat().st_mtime_ns, path.read_text()] for path in paths}


def _is_at(run: Any, given: set[int], place: int | None) -> bool:
    """Whether these rows are of the batch at `place` of the plan; at no place where a call names none."""
    return place is not None and given <= set(run.data.plan.batch(place).rows.tolist())


@contextlib.contextmanager
def _disturbed(call: Mapping[str, Any], rows: list[list[int]]) -> Iterator[None]:
    from megam3 import trainer
    from megam3.step import Wishes

    original = trainer.run_step

    def run_step(run: Any, batches: Any, progress: Any, wishes: Any, *waited: float) -> Any:
        rank, step, name = call.get("signal", (None, None, "SIGTERM"))
        if (rank, step) == (trainer.comm.rank(), progress.step):
            os.kill(os.getpid(), signal.Signals[name])
            # Python runs the handler a moment later, the loop would see it at the next step
            wishes = Wishes(requeue=name == "SIGUSR1", stop=name in ("SIGTERM", "SIGINT"))
        given = {row for batch in batches for row in batch.rows.tolist()}
        rows.append(sorted(given))
        if _is_at(run, given, call.get("dies_at")):
            raise RuntimeError("this call ends here")
        if _is_at(run, given, call.get("killed_at")):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(_is_at(run, given, place) for place in call.get("poison", ())):
            factor = math.nan if trainer.comm.is_main() else 1.0
            backward = run.engine.backward
            with mock.patch.object(run.engine, "backward", lambda loss, last: backward(loss * factor, last)):
                return original(run, batches, progress, wishes, *waited)
        return original(run, batches, progress, wishes, *waited)

    with mock.patch.object(trainer, "run_step", run_step):
        yield


def launch(
    *arguments: str, flag: str = "--num_accelerators", module: str = "megam3.train", **environ: str
) -> subprocess.Popen:
    """Start two ranks with DeepSpeed's launcher, in a process group of their own; standard output and error
    together."""
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        flag,
        "2",
        "--master_port",
        str(free_port()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environ}
    return subprocess.Popen(
        [*command, "--module", module, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
