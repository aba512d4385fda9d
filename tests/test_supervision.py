"""What stands around a run, on real runs: one run a folder, nothing lost by an evaluation, signals at any
time, no silent hang.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megam3.checkpoint import list_steps
from megam3.files import write_json
from megam3.obs.health import EXIT_STALLED
from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED
from tests.launches import ROOT, Workplace, launch, make_workplace, train_calls
from tests.ranks import run_ranks

LONG = ("train.steps=100000", "train.log_every_steps=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("supervision"))


def start(place: Workplace, name: str, *arguments: str, code: str = "", **environ: str) -> subprocess.Popen:
    """One process in a session of its own; `code` runs before the training, in its process."""
    program = (
        ["-c", f"{code}\nfrom megam3.train import main\nsys.exit(main())"] if code else ["-m", "megam3.train"]
    )
    return subprocess.Popen(
        [sys.executable, *program, place.recipe, f"name={name}", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for_step(place: Workplace, name: str, step: int, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + 300
    while not (place.run(name) / "metrics.jsonl").exists() or len(place.rows(name)) < step:
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{name} did not reach step {step}"
        time.sleep(0.05)


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        pytest.fail(f"still running after {seconds} s: {said}")
    return process.returncode, said


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    """Runs of a few steps, one after another in one process."""
    changed = ["train.steps=6", "optim.eps=1.0e-3", "optim.betas=[0.5,0.98]", "optim.weight_decay=0.3"]
    arguments = {
        "first": ["name=changed", "train.steps=2"],
        "changed": ["name=changed", *changed],
        "first elsewhere": ["name=elsewhere", "train.steps=2"],
        "elsewhere": ["name=elsewhere", *changed, "engine.template=zero2"],
        "first same": ["name=same", "train.steps=2"],
        "same": ["name=same", "train.steps=6"],
        "minutes": ["name=minutes", "train.steps=4", "train.save_every_minutes=1.0e-9"],
        "back": ["name=minutes", "train.steps=4", "train.resume_step=2"],
        "no such step": ["name=minutes", "train.resume_step=77"],
        "poisoned": [
            "name=poisoned",
            "engine.on_nonfinite=skip",
            "engine.max_skipped_steps=3",
            "train.steps=20",
        ],
    }
    poisoned = place.folder / "poisoned"
    made = [{"name": name, "arguments": [place.recipe, *given]} for name, given in arguments.items()]
    made[-1]["arguments"].append(f"model.path={poison(place, poisoned)}")
    return run_ranks(train_calls, 1, made)[0]


def poison(place: Workplace, folder: Path) -> Path:
    import shutil

    import torch

    shutil.copytree(place.folder / "model", folder)
    head = torch.load(folder / "sparse_linear.pt", weights_only=True)
    head["bias"][:] = float("nan")
    torch.save(head, folder / "sparse_linear.pt")
    return folder


def test_what_changed_since_the_checkpoint_is_said(calls: dict[str, dict]) -> None:
    said = calls["changed"]["said"]
    assert "changed since the checkpoint: optim.eps: 1e-08 -> 0.001" in said
    assert "changed since the checkpoint: optim.betas: [0.9, 0.999] -> [0.5, 0.98]" in said
    assert "train.steps: 2 -> 6" in said
    assert "changed since" not in calls["first"]["said"]


def test_changed_moment_decays_take_effect_at_the_same_layout_as_at_another(
    calls: dict[str, dict], place: Workplace
) -> None:
    # at another ZeRO stage weights and moments are joined by name, and the settings are the recipe's
    losses = {
        name: [row["loss/total"] for row in place.rows(name)] for name in ("changed", "elsewhere", "same")
    }
    assert losses["changed"] == pytest.approx(losses["elsewhere"], rel=1e-5)
    assert losses["changed"][-1] != pytest.approx(losses["same"][-1], rel=1e-3)


def test_checkpoints_come_by_the_clock_where_nobody_gave_a_number_of_steps(
    calls: dict[str, dict], place: Workplace
) -> None:
    assert calls["minutes"]["code"] == 0, calls["minutes"]["said"]
    # the clock is read before a step and the ranks agree at its end
    assert [f"step-00000{step}: " in calls["minutes"]["said"] for step in (1, 2, 3, 4)] == [True] * 4


def test_a_run_goes_back_to_the_step_that_is_asked_for(calls: dict[str, dict], place: Workplace) -> None:
    assert "starting at step 2" in calls["back"]["said"]
    names = sorted(path.name for path in (place.run("minutes") / "checkpoints").glob("step-*"))
    assert names == ["step-000002", "step-000003.later-1", "step-000004", "step-000004.later-1"]
    assert calls["no such step"]["code"] == 2
    assert (
        "train.resume_step = 77: must be a whole checkpoint of this run; there are: step-000004"
        in (calls["no such step"]["said"])
    )


def test_skipping_has_an_end(calls: dict[str, dict]) -> None:
    assert calls["poisoned"]["code"] == 2
    assert "4 steps in a row were not finite (engine.max_skipped_steps = 3)" in calls["poisoned"]["said"]


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives_and_not_after(
    place: Workplace,
) -> None:
    first = start(place, "shared", *LONG)
    wait_for_step(place, "shared", 2, first)
    code, said = finish(start(place, "shared", *LONG))
    assert code == 2, said
    assert f"another run uses this folder: process {first.pid} on " in said
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    # nothing of the refused one is in the folder: the killed run is followed at once
    code, said = finish(start(place, "shared", "train.steps=3"))
    assert code == 0, said


def test_a_run_whose_folder_was_taken_does_not_publish(place: Workplace) -> None:
    process = start(place, "taken", *LONG, "train.save_every_steps=40")
    wait_for_step(place, "taken", 2, process)
    lease = place.run("taken") / "lease.json"
    write_json(lease, {**json.loads(lease.read_text()), "token": "other", "host": "gpu07"})
    published = newest_step(place, "taken")
    code, said = finish(process)
    assert code == 2, said
    assert "no longer holds it; it belongs to process" in said
    # one may have been past the fence when the folder was taken
    assert newest_step(place, "taken") <= published + 40


def newest_step(place: Workplace, name: str) -> int:
    """Of the checkpoints that have their name; 0 without one."""
    return max(list_steps(str(place.run(name))), default=0)


def test_an_evaluation_that_crashes_loses_no_step_and_is_caught_up_on(place: Workplace) -> None:
    crash = (
        "import sys, megam3.build as build\n"
        "def crash(*a, **k): raise MemoryError('in evaluation')\n"
        "build.evaluate = crash"
    )
    arguments = ("train.steps=3", "train.evaluate_every_steps=3", f"evaluation.folders=[{place.folder}/beir]")
    code, said = finish(start(place, "crash", *arguments, code=crash))
    assert code == 1, said
    assert "MemoryError: in evaluation" in said
    code, said = finish(start(place, "crash", *arguments))
    assert code == 0, said
    assert "starting at step 3" in said
    assert list((place.run("crash") / "eval").glob("step-000003-*.json"))


# the program as `python -m megam3.train` runs it; it sends itself a signal when it comes to import a module
SIGNAL_AT_IMPORT = """
import os, runpy, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIG{sent})

sys.meta_path.insert(0, Sender())
runpy.run_module("megam3.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("sent", ["USR1", "TERM"])
@pytest.mark.parametrize("module", ["megam3.dist.env", "torch", "torch.utils.tensorboard"])
def test_a_signal_during_the_start_is_kept(place: Workplace, sent: str, module: str) -> None:
    # from the first import after the handlers to the last before the first step; an interpreter's own first
    # moments, before any line of ours, are the system's default
    program = SIGNAL_AT_IMPORT.format(module=module, sent=sent)
    process = start(place, f"early-{sent}-{module}", *LONG, code=program)
    code, said = finish(process)
    assert code == {"USR1": EXIT_REQUEUE, "TERM": EXIT_STOPPED}[sent], said
    assert "stopped at step 1 of 100000; newest checkpoint: step 1" in said


def test_a_requeued_job_does_not_begin_anew_a_second_time(place: Workplace) -> None:
    finish(start(place, "anew", "train.steps=2"))
    anew = ("train.resume=never", "train.save_every_steps=1")
    code, said = finish(start(place, "anew", "train.steps=3", *anew, MEGAM3_JOB="17"))
    assert code == 0, said
    assert "starting at step 0" in said
    assert "the checkpoints of an earlier run are now in" in said
    for job, first in (("17", 3), ("18", 0)):
        code, said = finish(start(place, "anew", "train.steps=4", *anew, MEGAM3_JOB=job))
        assert code == 0, said
        assert f"starting at step {first}" in said


def ranks_below(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes under a launcher, in rank order."""
    found = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "megam3.train" in child.cmdline() and "RANK" in child.environ()
    ]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def still_running(processes: list[psutil.Process], seconds: float = 120.0) -> list[psutil.Process]:
    """Those that do not end within that time. One that has ended and that nobody has asked about yet, such as
    an orphan in a container whose first process collects none, has ended."""
    end = time.monotonic() + seconds
    while alive := [each for each in processes if is_alive(each)]:
        if time.monotonic() >= end:
            break
        time.sleep(0.05)
    return alive


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.ranks
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run_with_its_name(place: Workplace, stopped: int) -> None:
    name = f"stalled-{stopped}"
    process = launch(place.recipe, f"name={name}", *LONG, "train.timeout_seconds=15")
    wait_for_step(place, name, 3, process)
    ranks = ranks_below(process)
    ranks[stopped].send_signal(signal.SIGSTOP)
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"megam3: rank {1 - stopped}: no progress for" in said
    if stopped == 1:
        assert f"rank 1 on {os.uname().nodename} (process {ranks[1].pid}) is silent since step" in said
    else:
        assert "rank 0, which serves the ranks' meeting point, does not answer" in said
    assert still_running(ranks) == []
    assert EXIT_STALLED == 86


@pytest.mark.ranks
def test_ranks_end_when_the_runner_is_killed(place: Workplace) -> None:
    process = launch(place.recipe, "name=orphans", *LONG)
    wait_for_step(place, "orphans", 2, process)
    ranks = ranks_below(process)
    os.kill(process.pid, signal.SIGKILL)
    assert still_running(ranks) == []
    # its steps are saved, as after a SIGTERM that the runner would not have passed on
    assert (place.run("orphans") / "checkpoints" / "latest").exists()


def test_a_stopped_data_worker_ends_the_run_with_its_phase(place: Workplace) -> None:
    process = start(
        place, "worker", *LONG, "train.timeout_seconds=10", "data.num_workers=1", "data.prefetch_batches=1"
    )
    wait_for_step(place, "worker", 2, process)
    for child in psutil.Process(process.pid).children():
        child.send_signal(signal.SIGSTOP)
    code, said = finish(process)
    assert code == EXIT_STALLED, said
    assert "megam3: rank 0: no progress for" in said
    assert ", data: this process stands there" in said


def test_a_full_disk_is_a_users_error_and_the_next_start_goes_on(place: Workplace, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=False)
    if made.returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        arguments = (
            f"output_dir={disk}",
            "train.save_every_steps=1",
            "train.keep_checkpoints=9",
            "train.steps=50",
        )
        code, said = finish(start(place, "full", *arguments))
        assert code == 2, said
        assert "megam3: error: output_dir" in said
        assert "Traceback" not in said
        assert "lower train.keep_checkpoints" in said
        code, said = finish(start(place, "full", *arguments[:2], "train.keep_checkpoints=1", "train.steps=9"))
        assert code == 0, said
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def test_no_secret_of_the_environment_and_no_file_for_everybody_to_write(place: Workplace) -> None:
    """Under the most permissive umask, with the keys that people have in their environment."""
    store = place.folder / "store of its own"
    secrets = {
        name: f"hidden-value-of-{name}"
        for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")
    }
    arguments = ("train.steps=2", "data.num_workers=1", f"data.store_dir={store}")
    code, said = finish(
        start(place, "guarded", *arguments, code="import os, sys; os.umask(0)", HF_HUB_OFFLINE="1", **secrets)
    )
    assert code == 0, said
    run = place.run("guarded")
    done = subprocess.run(
        [sys.executable, "-m", "megam3", "report", str(run)],
        env={**os.environ, **secrets, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    paths = [run, store, *run.rglob("*"), *store.rglob("*")]
    assert {"env.json", "log.txt", "heartbeat.json", "metrics.jsonl", "COMPLETE", "report.html"} <= {
        p.name for p in paths
    }
    assert [str(path) for path in paths if path.stat().st_mode & 0o002] == []
    texts = {str(path): path.read_bytes() for path in paths if path.is_file()}
    assert [name for name, text in texts.items() if b"hidden-value" in text] == []
    assert "hidden-value" not in said
