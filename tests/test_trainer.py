"""The training loop on real ranks: what a run folder holds, and that a run that was stopped, killed or
damaged ends like any other."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megam3.checkpoint import consolidated_weights
from megam3.cli import report_user_errors
from megam3.config.load import load_config
from megam3.embedder import M3Embedder
from megam3.obs.figures import meaning
from tests.launches import HELD, ROOT, STEPS_PER_EPOCH, Workplace, launch, make_workplace, train_calls
from tests.ranks import run_ranks

HEADS = ("dense", "lexical", "multi_vector", "sum")
RESUMABLE = ["train.steps=12", "train.save_every_steps=5", "data.num_workers=2"]
LONG = ["train.steps=60", "train.save_every_steps=6", "engine.template=zero3", "data.num_workers=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def pair(place: Workplace) -> list[dict[str, dict]]:
    """Calls on two ranks, one after another; per rank, results by name."""
    calls: list[dict] = [{"name": "indivisible", "arguments": ["data.batch.global_queries=7"]}]
    for stage in (1, 3):
        template, stopped = f"engine.template=zero{stage}", f"name=stopped{stage}"
        calls += [
            {"name": f"whole{stage}", "arguments": [f"name=whole{stage}", template, *RESUMABLE]},
            {
                "name": f"usr1 {stage}",
                "arguments": [stopped, template, *RESUMABLE],
                "signal": (1, 3, "SIGUSR1"),
            },
            {
                "name": f"term {stage}",
                "arguments": [stopped, template, *RESUMABLE],
                "signal": (0, STEPS_PER_EPOCH + 2, "SIGTERM"),
            },
            {"name": f"last {stage}", "arguments": [stopped, template, *RESUMABLE]},
        ]
    for stage in (0, 2):
        calls.append(
            {
                "name": f"whole{stage}",
                "arguments": [f"name=whole{stage}", f"engine.template=zero{stage}", "train.steps=2"],
            }
        )
    calls.append({"name": "long", "arguments": ["name=long", *LONG]})
    calls = [{**call, "arguments": [place.recipe, *call["arguments"]]} for call in calls]
    return run_ranks(train_calls, 2, calls)


@pytest.fixture(scope="module")
def alone(place: Workplace) -> dict[str, dict]:
    """Two steps of each ZeRO stage in one process."""
    arguments = {
        f"alone{stage}": [place.recipe, f"name=alone{stage}", f"engine.template=zero{stage}", "train.steps=2"]
        for stage in range(4)
    }
    return run_ranks(
        train_calls, 1, [{"name": name, "arguments": given} for name, given in arguments.items()]
    )[0]


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_a_signalled_run_saves_and_continues_to_the_same_bits(
    place: Workplace, pair: list[dict], stage: int
) -> None:
    assert [[rank[f"{name} {stage}"]["code"] for rank in pair] for name in ("usr1", "term", "last")] == [
        [85, 85],
        [143, 143],
        [0, 0],
    ]
    said = pair[0][f"usr1 {stage}"]["said"]
    assert "stopped at step 4 of 12; newest checkpoint: step 4" in said
    assert "resumed from" in pair[0][f"term {stage}"]["said"]
    # with dropout, workers, ragged groups and an epoch's edge after every fifth step
    assert place.figures(f"stopped{stage}") == place.figures(f"whole{stage}")
    assert [row["step"] for row in place.rows(f"stopped{stage}")] == list(range(1, 13))
    ends = [
        consolidated_weights(str(place.run(f"{name}{stage}") / "checkpoints" / "step-000012"))
        for name in ("stopped", "whole")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@pytest.mark.ranks
def test_a_world_size_that_does_not_divide_the_batch_is_told_once(pair: list[dict]) -> None:
    assert [rank["indivisible"]["code"] for rank in pair] == [2, 2]
    said = pair[0]["indivisible"]["said"]
    assert (
        "data.batch.global_queries = 7: 2 ranks must share the queries of a step equally; use 6 or 8" in said
    )
    assert pair[1]["indivisible"]["said"] == ""


@pytest.mark.ranks
def test_a_run_folder_holds_what_the_readme_says(place: Workplace) -> None:
    evaluated = [f"evaluation.folders=[{place.folder}/beir]", "train.evaluate_every_steps=4"]
    started = launch(
        place.recipe,
        "name=folder",
        "engine.template=zero3",
        "train.steps=6",
        *evaluated,
        flag="--num_gpus",
        DS_ACCELERATOR="cpu",
    )
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 0, said
    run = place.run("folder")
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    wanted = {"recipe.yaml", "ds_config.json", "env.json", "log.txt", "metrics.jsonl"}
    wanted |= {
        "eval/step-000004-beir.json",
        "eval/step-000006-beir.json",
        "checkpoints/latest",
        "checkpoints/step-000006/COMPLETE",
    }
    assert wanted <= files, files
    assert not [name for name in files if ".partial" in name]
    recipe = load_config(run / "recipe.yaml")
    assert (recipe.train.steps, recipe.engine.template, recipe.optim.betas) == (6, "zero3", [0.9, 0.999])
    assert json.loads((run / "ds_config.json").read_text())["zero_optimization"]["stage"] == 3
    environment = json.loads((run / "env.json").read_text())
    assert (environment["world_size"], environment["threads"]) == (2, 1)
    assert "folder: 2 ranks, ZeRO stage 3, 6 steps" in (run / "log.txt").read_text()
    scores = json.loads((run / "eval" / "step-000004-beir.json").read_text())
    assert scores["num_queries"] == 5, scores
    check_metrics(place, "folder")


def check_metrics(place: Workplace, name: str) -> None:
    rows = place.rows(name)
    assert [row["step"] for row in rows] == list(range(1, 7))
    wanted = {
        "loss/total",
        "optim/grad_norm",
        "optim/lr",
        "speed/tokens_per_second",
        "lexical/nonzero_share",
        "lexical/mean_weight",
    }
    wanted |= {f"{kind}/{head}" for kind in ("loss", "accuracy") for head in HEADS} | {
        "memory/peak_bytes",
        "data/padding_avoided_share",
    }
    for row in rows:
        assert wanted <= row.keys(), row
        assert not [figure for figure in row if figure != "step" and meaning(figure) is None], row
        assert "nonfinite" not in row
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["lexical/nonzero_share"] <= 1
        assert 0 < row["data/padding_avoided_share"] < 1
        assert row["memory/peak_bytes"] > 1e8
        assert all(0 <= row[f"accuracy/{head}"] <= 1 for head in HEADS)
    events = EventAccumulator(str(place.run(name) / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for key in rows[0].keys() - {"step"}:
        seen = [(event.step, event.value) for event in events.Scalars(key)]
        assert seen == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows], key


@pytest.mark.ranks
def test_a_killed_run_started_again_ends_like_one_that_never_was(
    place: Workplace, pair: list[dict], tmp_path: Path
) -> None:
    assert pair[0]["long"]["code"] == 0, pair[0]["long"]["said"]
    checkpoints = place.run("killed") / "checkpoints"
    arguments = (place.recipe, "name=killed", *LONG)
    (tmp_path / "held.py").write_text(HELD)
    hold = tmp_path / "hold"

    def launch_held(step: int) -> subprocess.Popen:
        hold.touch()
        environ = {"HELD_AT": str(step), "HELD_WHILE": str(hold), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        return launch(*arguments, module="held", **environ)

    # SIGTERM to the whole group is what a terminal, systemd or a container sends; the ranks save, the
    # launcher just ends
    started = launch_held(13)  # the checkpoint of step 6 has its name by the save of step 12 at the latest
    ranks = ranks_after(started, checkpoints / "step-000006" / "COMPLETE")
    os.killpg(started.pid, signal.SIGTERM)
    hold.unlink()
    psutil.wait_procs(ranks, timeout=300)
    said = started.communicate(timeout=300)[0]
    stopped = int((checkpoints / "latest").read_text().removeprefix("step-"))
    assert f"stopped at step {stopped} of 60; newest checkpoint: step {stopped}" in said, said
    # SIGKILL leaves no time to save: the steps since the newest checkpoint are taken again
    newer = stopped // 6 * 6 + 12
    started = launch_held(newer + 7)
    ranks = ranks_after(started, checkpoints / f"step-{newer:06d}" / "COMPLETE")
    for rank in ranks:
        rank.kill()
    started.communicate(timeout=300)
    assert started.returncode != 0
    last = launch(*arguments)
    assert last.wait(timeout=300) == 0, last.communicate()[0]
    assert place.figures("killed") == place.figures("long")
    events = EventAccumulator(str(place.run("killed") / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 61))


def ranks_after(started: subprocess.Popen, marker: Path) -> list[psutil.Process]:
    """The ranks below a launcher, once `marker` is there."""
    end = time.monotonic() + 240
    while not marker.exists():
        assert started.poll() is None, started.communicate()[0]
        assert time.monotonic() < end, f"no {marker}"
        time.sleep(0.01)
    below = psutil.Process(started.pid).children(recursive=True)
    return [
        process for process in below if any(word.startswith("--local_rank") for word in process.cmdline())
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_any_stage_and_world_size_becomes_a_folder(
    place: Workplace,
    pair: list[dict],
    alone: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: int,
    world_size: int,
) -> None:
    name = f"alone{stage}" if world_size == 1 else f"whole{stage}"
    result = (alone if world_size == 1 else pair[0])[name]
    assert result["code"] == 0, result["said"]
    newest = (place.run(name) / "checkpoints" / "latest").read_text()
    assert (
        report_user_errors(
            load_tool("convert_to_hf").main,
            [str(place.run(name) / "checkpoints" / newest), str(tmp_path / "out")],
        )
        == 0
    )
    differences = [
        float(line.rsplit(" ", 1)[1])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("largest")
    ]
    assert len(differences) == 3
    assert max(differences) <= 1e-5
    encoded = M3Embedder(str(tmp_path / "out")).encode(["a text", "another one"], max_tokens=24)
    assert encoded.dense_vecs.shape == (2, 32)


def load_tool(name: str):
    """A file of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.ranks
def test_conversion_from_the_command_line_without_the_model_it_started_from(
    place: Workplace, pair: list[dict], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(place.run("whole3") / "checkpoints" / "step-000012", tmp_path / "copied"))
    command = [sys.executable, "tools/convert_to_hf.py"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(copied), str(tmp_path / "out")], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"written: {tmp_path / 'out'}" in done.stdout
    again = report_user_errors(load_tool("convert_to_hf").main, [str(copied), str(tmp_path / "out")])
    assert again == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere", "out"],
            "must be a complete checkpoint (never completed); name a folder checkpoints/step-NNNNNN",
        ),
        (["torn", "out"], "must be a complete checkpoint (manifest.json was changed)"),
    ],
)
def test_conversion_says_what_is_wrong_with_its_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn").mkdir()
    for name in ("COMPLETE", "manifest.json"):
        (tmp_path / "torn" / name).write_text("{}")
    assert report_user_errors(load_tool("convert_to_hf").main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FAILS_ON_RANK_1 = """
import sys
from megam3 import train, trainer
from megam3.errors import DataError

original = trainer.run_step
def run_step(run, batches, progress, wishes, waited):
    if trainer.comm.rank() == 1 and progress.step == 1:
        raise DataError("shard.arrow", 7, "cannot be read on this node", "mount it")
    return original(run, batches, progress, wishes, waited)

trainer.run_step = run_step
sys.exit(train.main())
"""


@pytest.mark.ranks
def test_an_error_on_one_rank_ends_all_of_them(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS_ON_RANK_1)
    started = launch(place.recipe, "name=fails", module="fails", PYTHONPATH=f"{tmp_path}:{ROOT}")
    said, _ = started.communicate(timeout=300)
    assert started.returncode in (1, 2), said
    assert said.count("megam3: rank 1: error: shard.arrow = 7: cannot be read on this node; mount it") == 1
    assert "Traceback" not in said


SLOW_RANKS = """
import sys, time
from megam3 import step, step_health, train
from megam3.data.dataset import TrainingData
from megam3.obs.alarms import StragglerWatch

seed_step, batches = step.seed_step, TrainingData.batches

def slow_passes(seed, number, rank):
    seed_step(seed, number, rank)
    until = time.process_time() + (2.0 if rank == 1 else 0.0)
    while time.process_time() < until:
        pass

def slow_data(self, rank, *arguments, **options):
    for batch in batches(self, rank, *arguments, **options):
        time.sleep(2.0 if rank == 0 else 0.0)
        yield batch

step.seed_step, TrainingData.batches = slow_passes, slow_data
step_health.StragglerWatch = lambda: StragglerWatch(min_seconds=1.0)
sys.exit(train.main())
"""


@pytest.mark.ranks
def test_slow_ranks_are_named_with_the_part_in_which_they_are_slow(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "slow_ranks.py").write_text(SLOW_RANKS)
    # one window over all steps: a busy machine that holds a rank up once is no slow rank
    steps = ("train.steps=4", "train.log_every_steps=4")
    started = launch(place.recipe, "name=slow", *steps, module="slow_ranks", PYTHONPATH=f"{tmp_path}:{ROOT}")
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 0, said
    log = (place.run("slow") / "log.txt").read_text()
    assert re.search(r"WARNING step \d: rank 1: forward and backward \d+\.\d+ x the fastest rank", log), log
    assert re.search(r"WARNING step \d: rank 0: data \d+\.\d+ x the fastest rank", log), log
    assert "rank 0: forward" not in log
    assert "rank 1: data" not in log
