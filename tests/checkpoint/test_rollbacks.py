"""A run that goes back to a checkpoint and round the data that spoiled a step: which rows it is given then,
and that a run killed afterwards ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.checkpoint import rollbacks
from megam3.checkpoint.rollbacks import FILE, read_rollbacks
from megam3.dist import comm
from megam3.errors import CheckpointError
from tests.launches import ROOT, Workplace, make_workplace, train_calls
from tests.ranks import run_ranks

FIELDS = ("failed_step", "what", "back_to", "first", "stop")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("rollbacks"))


def calls_of(place: Workplace, world: int) -> list[dict]:
    """All calls on `world` ranks; a checkpoint every third step, and the plan's 5th and 10th step bad."""

    def call(label: str, run: str, *options: str, **disturbance) -> dict:
        policy = ["engine.on_nonfinite=rollback", "train.save_every_steps=3", f"engine.template=zero{world}"]
        arguments = [place.recipe, f"name={run}{world}", "train.steps=8", *policy, *options]
        return {"name": label, "arguments": arguments, **disturbance}

    return [
        call("healthy", "healthy", "train.steps=14"),
        call("bad", "bad", poison=[4, 9]),
        # at the second step after the first return, which no checkpoint knows of yet
        call("killed", "killed", poison=[4, 9], dies_at=6),
        call("killed again", "killed", poison=[4, 9], dies_at=11),
        call("resumed", "killed", poison=[4, 9]),
        call("first step", "first", "train.steps=2", poison=[0]),
        call("limit", "limit", "engine.max_rollbacks=1", poison=[4, 9]),
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_goes_round_bad_data_and_repeats_that_when_it_is_killed(place: Workplace, world: int) -> None:
    # seven runs: three minutes were not enough on two cores with other work
    ranks = run_ranks(train_calls, world, calls_of(place, world))
    codes = {name: [rank[name]["code"] for rank in ranks] for name in ranks[0]}
    expected = {
        "healthy": 0,
        "bad": 0,
        "killed": 1,
        "killed again": 1,
        "resumed": 0,
        "first step": 0,
        "limit": 2,
    }
    assert codes == {name: [code] * world for name, code in expected.items()}, ranks[0]["bad"]["said"]
    # place 4 fails as step 5, back to step 3 at place 3; places 5, 6 … follow: place 9 fails as step 8, when
    # the newest checkpoint is that of step 6 at place 8
    for rank in ranks:
        plan = rank["healthy"]["rows"]
        assert rank["bad"]["rows"] == [plan[p] for p in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
        assert rank["first step"]["rows"] == [plan[p] for p in (0, 1, 2)]
    entries = json.loads((place.run(f"bad{world}") / "checkpoints" / FILE).read_text())
    assert [tuple(entry[field] for field in FIELDS) for entry in entries] == [
        (5, "gradient norm", 3, 3, 5),
        (8, "gradient norm", 6, 8, 10),
    ]
    state = json.loads((place.run(f"bad{world}") / "checkpoints" / "step-000008" / "state.json").read_text())
    assert state["skipped"] == [[3, 5], [8, 10]]
    assert [row["step"] for row in place.rows(f"bad{world}")] == list(range(1, 9))
    assert place.figures(f"killed{world}") == place.figures(f"bad{world}")
    said = ranks[0]["bad"]["said"]
    assert (
        "step 5: gradient norm is not finite; back to step 3, and steps 4 to 5 of the plan are left out"
        in said
    )
    assert "steps 4 to 5 of the plan are left out: the run has gone round them" in ranks[0]["resumed"]["said"]
    said = ranks[0]["limit"]["said"]
    assert "step 8 = 'gradient norm': is not finite, and the run went back 1 times already" in said
    assert "checkpoints: 0, 3, 6" in said


def test_returns_on_other_data_do_not_count_and_a_damaged_note_stops_the_run(tmp_path: Path) -> None:
    assert read_rollbacks(str(tmp_path), "a") == []
    entry = {"failed_step": 5, "what": "x", "back_to": 3, "first": 3, "stop": 5, "data_fingerprint": "a"}
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / FILE
    path.write_text(json.dumps([entry, {**entry, "data_fingerprint": "b"}]))
    assert [found.data_fingerprint for found in read_rollbacks(str(tmp_path), "a")] == ["a"]
    for content in (b"[{}]", b"{", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"rollbacks = .*cannot be read.*train.resume=never"):
            read_rollbacks(str(tmp_path), "a")


def _read_where_one_rank_sees_no_file(run_dir: str) -> list[tuple[int, int]]:
    if not comm.is_main():

        def unseen(path: str) -> None:
            raise FileNotFoundError(path)  # what NFS answers from its memory of an earlier look

        rollbacks.read_json = unseen
    return [(found.first, found.stop) for found in read_rollbacks(run_dir, "a")]


@pytest.mark.ranks
def test_a_rank_that_does_not_see_the_note_yet_goes_round_the_same_places(tmp_path: Path) -> None:
    entry = {"failed_step": 5, "what": "x", "back_to": 3, "first": 3, "stop": 5, "data_fingerprint": "a"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / FILE).write_text(json.dumps([entry]))
    assert run_ranks(_read_where_one_rank_sees_no_file, 2, str(tmp_path)) == [[(3, 5)]] * 2


def policy_of(place: Workplace, name: str, stage: int) -> list[str]:
    policy = ["engine.on_nonfinite=rollback", "train.save_every_steps=3", f"engine.template=zero{stage}"]
    return [place.recipe, f"name={name}{stage}", "train.steps=7", *policy]


def run_alone(call: dict) -> subprocess.CompletedProcess:
    """`train_calls` in a process of its own, which may be killed."""
    program = "import json, sys; from tests.launches import train_calls\n"
    program += "found = train_calls([json.loads(sys.argv[1])])['call']; print(found['said'])\n"
    program += "sys.exit(found['code'])"
    return subprocess.run(
        [sys.executable, "-c", program, json.dumps({**call, "name": "call"})],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 3])
def test_a_process_killed_behind_a_return_ends_with_the_same_bits(place: Workplace, stage: int) -> None:
    whole = run_alone({"arguments": policy_of(place, "whole", stage), "poison": [4]})
    assert whole.returncode == 0, whole.stdout + whole.stderr
    # place 6 is the step after the return to step 3: rollbacks.json knows of it, no checkpoint does
    killed = {"arguments": policy_of(place, "sigkill", stage), "poison": [4]}
    assert run_alone({**killed, "killed_at": 6}).returncode == -signal.SIGKILL
    folder = place.run(f"sigkill{stage}") / "checkpoints"
    assert (folder / "latest").read_text().strip() == "step-000003"
    assert len(json.loads((folder / FILE).read_text())) == 1
    resumed = run_alone(killed)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "steps 4 to 5 of the plan are left out: the run has gone round them" in resumed.stdout
    assert place.figures(f"sigkill{stage}") == place.figures(f"whole{stage}")
    assert [row["step"] for row in place.rows(f"sigkill{stage}")] == list(range(1, 8))
