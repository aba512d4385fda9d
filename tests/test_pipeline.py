"""`megam3 pipeline`: a tiny chain that really runs, what a second start skips and reruns, and failures."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megam3.cli import main
from megam3.errors import DataError
from megam3.model.hub import ResolvedModel
from megam3.obs.metrics import read_metrics
from megam3.pipeline import DONE, LOG, STARTED, run_pipeline
from megam3.pipeline_file import read_pipeline
from megam3.retrieval.results import read_result
from tests.launches import Workplace, make_workplace

CHAIN = """\
folder: {folder}/chain
inputs:
  pairs: {folder}/pairs.jsonl
  start: {folder}/model
  recipe: {folder}/recipe.yaml
  beir: {folder}/beir
stages:
  - name: mine
    command: mine
    arguments: "{{inputs.pairs}} --model {{inputs.start}} --output {{output}} --range 0-20 --negatives 2"
  - name: learn
    command: train
    arguments: "{{inputs.recipe}} 'data.train.0.paths=[{{mine.output}}]' train.steps=2"
  - name: export
    command: export
    arguments: "{{learn.checkpoint}} {{output}}"
  - name: evaluate
    command: evaluate
    arguments: "{{export.output}} {{inputs.beir}} --out {{output}} --modes Dense"
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("pipeline"))


def statuses(path: Path) -> dict[str, str]:
    said: list[str] = []
    return {result.stage.name: result.status for result in run_pipeline(read_pipeline(path), said.append)}


@pytest.mark.slow
def test_a_chain_runs_skips_and_reruns(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace.folder / "chain.yaml"
    path.write_text(CHAIN.format(folder=workplace.folder))
    chain = workplace.folder / "chain"
    assert main(["pipeline", str(path)]) == 0
    table = capsys.readouterr().out
    assert table.count("finished") == 4

    mined = [json.loads(line) for line in (chain / "mine/output.jsonl").read_text().splitlines()]
    assert {len(record["neg"]) for record in mined} == {2}
    recipe = (chain / "learn/learn/recipe.yaml").read_text()
    assert f"{chain}/mine/output.jsonl" in recipe  # the train stage reads what the stage before wrote
    rows = [row for row in read_metrics(chain / "learn/learn/metrics.jsonl") if "loss/total" in row]
    assert [row["step"] for row in rows] == [1, 2]
    ndcg = read_result(chain / "evaluate/output/beir.json").modes["Dense"].overall["ndcg@10"]
    for figure in (f"{rows[-1]['loss/total']:.4f}", f"{ndcg:.3f}", f"{len(mined)} queries"):
        assert figure in " ".join(table.split())

    # a second start runs nothing
    before = {name: (chain / name / DONE).stat().st_mtime_ns for name in ("mine", "learn", "export")}
    assert statuses(path) == dict.fromkeys(("mine", "learn", "export", "evaluate"), "skipped")
    assert before == {name: (chain / name / DONE).stat().st_mtime_ns for name in before}

    # what a program is told of it
    capsys.readouterr()
    assert main(["pipeline", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    figures = {stage["name"]: stage["figures"] for stage in said["stages"]}
    assert figures == {
        "mine": {"queries": len(mined), "negatives": 2 * len(mined)},
        "learn": {"step": 2, "loss": rows[-1]["loss/total"]},
        "export": {},
        "evaluate": {"ndcg@10": {"beir": {"Dense": ndcg}}},
    }
    assert {stage["status"] for stage in said["stages"]} == {"skipped"}

    # a changed argument reruns its stage and what follows; the old model is kept
    path.write_text(path.read_text().replace("train.steps=2", "train.steps=3"))
    assert statuses(path) == {"mine": "skipped"} | dict.fromkeys(("learn", "export", "evaluate"), "finished")
    assert (chain / "learn/learn/checkpoints/step-000003").is_dir()
    assert (chain / "learn.old-1/learn/checkpoints/step-000002").is_dir()

    # a stage killed before it could say that it is done: only it runs, and an output left behind is replaced
    (chain / "export" / DONE).unlink()
    assert statuses(path) == dict.fromkeys(("mine", "learn", "evaluate"), "skipped") | {"export": "finished"}


def write(folder: Path, stages: str, inputs: str = "{}") -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(f"folder: {folder}/out\ninputs: {inputs}\nstages:\n{stages}")
    return path


def test_a_failing_stage_names_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "  - {name: first, command: import, arguments: '/no/such/model {output}'}\n"
    stages += "  - {name: second, command: import, arguments: '{first.output} {output}'}\n"
    assert main(["pipeline", str(write(tmp_path, stages))]) == 2
    said = capsys.readouterr()
    log = tmp_path / "out" / "first" / LOG
    assert f"stage = 'first': failed and said last: {log.read_text().strip().splitlines()[-1]}" in said.err
    assert f"read {log}, then give the same command again" in said.err
    assert "failed" in said.out
    assert not (tmp_path / "out" / "second").exists()
    assert not (tmp_path / "out" / "first" / DONE).exists()
    assert (tmp_path / "out" / "first" / STARTED).exists()


def test_a_missing_input_is_told_before_the_first_stage(tmp_path: Path) -> None:
    stages = "  - {name: first, command: import, arguments: 'x {output}'}\n"
    stages += "  - {name: second, command: import, arguments: '{inputs.gone} {output}'}\n"
    path = write(tmp_path, stages, f"{{gone: {tmp_path}/gone}}")
    with pytest.raises(
        DataError, match=r"inputs\.gone of stage second = .*: does not exist; correct the path"
    ):
        list(run_pipeline(read_pipeline(path), print))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def commands_that_write_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Each stage is `sys.executable -m megam3 …`: here one that notes its arguments and waits if asked."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path / "calls"


def test_the_output_of_an_earlier_stage_is_missing(tmp_path: Path, commands_that_write_nothing: Path) -> None:
    stages = "  - {name: first, command: train, arguments: r.yaml}\n"
    stages += "  - {name: second, command: export, arguments: '{first.checkpoint} {output}'}\n"
    with pytest.raises(DataError) as caught:
        list(run_pipeline(read_pipeline(write(tmp_path, stages)), print))
    assert "{first.checkpoint} = " in str(caught.value)
    assert f"holds no whole checkpoint; read {tmp_path}/out/first/{LOG}" in str(caught.value)
    stages = stages.replace("first.checkpoint", "first.output")
    with pytest.raises(
        DataError, match=r"stage second, \{first\.output\} = .*: does not exist; read .*log\.txt"
    ):
        list(run_pipeline(read_pipeline(write(tmp_path, stages)), print))


def test_no_shell_reads_the_arguments(tmp_path: Path, commands_that_write_nothing: Path) -> None:
    stages = "  - {name: first, command: import, arguments: '$(touch hacked) ; * {output}'}\n"
    list(run_pipeline(read_pipeline(write(tmp_path, stages)), print))
    assert (
        commands_that_write_nothing.read_text()
        == f"-m megam3 import $(touch hacked) ; * {tmp_path}/out/first/output\n"
    )


def test_a_changed_input_file_reruns_its_stage(tmp_path: Path, commands_that_write_nothing: Path) -> None:
    data = tmp_path / "data"
    data.write_text("one")
    path = write(
        tmp_path, "  - {name: first, command: mine, arguments: '{inputs.x} {output}'}\n", f"{{x: {data}}}"
    )
    output = tmp_path / "out" / "first" / "output.jsonl"
    for content, expected in [("one", "finished"), ("one", "skipped"), ("two", "finished")]:
        data.write_text(content)
        assert statuses(path) == {"first": expected}
        output.touch()
    output.unlink()  # finished, but what it wrote is gone
    assert statuses(path) == {"first": "finished"}


def test_a_signal_reaches_the_stage_whose_code_is_passed_on(tmp_path: Path) -> None:
    # a stage that tells when it is ready, and leaves with 85 on SIGUSR1, as `megam3 train` does
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ntrap 'exit 85' USR1\necho ready\nwhile :; do sleep 0.1; done\n")
    script.chmod(0o755)
    path = write(tmp_path, "  - {name: first, command: train, arguments: r.yaml}\n")
    code = (
        "import sys; from megam3.commands.pipeline import main; "
        f"sys.executable = {str(script)!r}; sys.exit(main([{str(path)!r}]))"
    )
    log = tmp_path / "out" / "first" / LOG
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.exists() and "ready" in log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 85
    assert "stopped" in said


def test_a_signal_that_comes_while_a_stage_is_started_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ntrap 'exit 85' USR1\necho ready\nwhile :; do sleep 0.1; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    log, popen = tmp_path / "out" / "first" / LOG, subprocess.Popen
    timers: list[threading.Timer] = []

    def held_up(*arguments: Any, **options: Any) -> subprocess.Popen:
        process = popen(*arguments, **options)
        end = time.monotonic() + 60
        while "ready" not in log.read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        signal.raise_signal(signal.SIGUSR1)
        # a signal that is lost would leave a stage that never ends
        timers.append(threading.Timer(60, process.kill))
        timers[0].start()
        return process

    monkeypatch.setattr(subprocess, "Popen", held_up)
    path = write(tmp_path, "  - {name: first, command: train, arguments: r.yaml}\n")
    found = statuses(path)
    timers[0].cancel()
    assert found == {"first": "stopped"}


def test_check_lists_stages_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "  - {name: first, command: import, arguments: 'x {output}'}\n")
    assert main(["pipeline", str(path), "--check"]) == 0
    assert capsys.readouterr().out == "first: megam3 import x {output}\n"
    assert not (tmp_path / "out").exists()


def test_an_input_may_be_a_model_of_the_hub(
    tmp_path: Path, commands_that_write_nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetched(name: str) -> ResolvedModel:
        asked.append(name)
        return ResolvedModel(str(tmp_path), "5617a9f")

    monkeypatch.setattr("megam3.pipeline.resolve_model", fetched)
    stages = "  - {name: first, command: import, arguments: '{inputs.start} {output}'}\n"
    list(run_pipeline(read_pipeline(write(tmp_path, stages, "{start: owner/name}")), print))
    assert asked == ["owner/name"]
    said = commands_that_write_nothing.read_text()
    assert said == f"-m megam3 import {tmp_path} {tmp_path}/out/first/output\n"
    # a mistyped path of data is no model's name
    with pytest.raises(DataError, match=r"inputs\.start .* = 'data/pairs.jsonl': does not exist"):
        list(run_pipeline(read_pipeline(write(tmp_path, stages, "{start: data/pairs.jsonl}")), print))
    assert asked == ["owner/name"]
