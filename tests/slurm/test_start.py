"""What the scripts of slurm/ hand on to srun, with a stand-in for it: words stay words."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.slurm.scripts import ROOT, run_script

SRUN = """#!{python}
import json, os, sys
with open({out!r}, "a") as stream:
    print(json.dumps([sys.argv[1:], os.environ.get("SRUN_CPUS_PER_TASK")]), file=stream)
"""
NASTY = [
    "$(touch {mark})",
    "`touch {mark}`",
    "; touch {mark};",
    "name=a b",
    "name='\"",
    "data.train.0.paths=[*.py]",
    "name=two\nlines",
    "name=أهلا",
    "--wrap=touch {mark}",
    "",
]


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on a machine whose srun writes down what it was given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "scontrol"):
        (programs / name).write_text(SRUN.format(python=sys.executable, out=str(tmp_path / f"{name}.log")))
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "MEGAM3_VENV": sys.prefix,
    }


def started(tmp_path: Path) -> tuple[list[str], str | None]:
    """Arguments of the one call of srun, and the cores a task that it was told."""
    (call,) = (tmp_path / "srun.log").read_text().splitlines()
    return json.loads(call)


@pytest.mark.parametrize(
    ("script", "module"), [("train.sh", ["megam3.train"]), ("mine.sh", ["megam3", "mine"])]
)
def test_arguments_reach_the_ranks_as_they_were_typed(
    tmp_path: Path, site: dict[str, str], script: str, module: list[str]
) -> None:
    mark = tmp_path / "a shell ran this"
    arguments = ["recipe.yaml", *(each.format(mark=mark) for each in NASTY)]
    done = run_script(script, *arguments, **site, SLURM_CPUS_PER_TASK="4")
    assert done.returncode == 0, done.stderr
    given, cores = started(tmp_path)
    assert given[given.index("-m") + 1 :] == [*module, *arguments]
    assert cores == "4"
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "SLURM_JOB_NAME",
            "SLURM_JOB_ID",
            "SLURM_JOB_NODELIST",
            "SLURM_RESTART_COUNT_TEXT",
            "MEGAM3_RANK_LOGS",
        ),
        *("MEGAM3_MODULE", "MEGAM3_SRUN_FLAGS", "MASTER_ADDR", "SLURM_CPUS_PER_TASK", "SLURM_HOSTFILE"),
    ],
)
def test_no_variable_of_a_job_is_run_as_a_command(tmp_path: Path, site: dict[str, str], name: str) -> None:
    """A job's name is anybody's choice, and so are the values that a site or a user sets."""
    mark = tmp_path / "mark"
    value = f"$(touch {mark}) `touch {mark}` ; touch {mark}"
    if name == "MEGAM3_RANK_LOGS":
        value = f"{tmp_path}/{value}"  # a folder of this name is made
    done = run_script("train.sh", "recipe.yaml", **{**site, name: value})
    assert not mark.exists(), done.stderr


def test_flags_are_words_and_no_patterns(tmp_path: Path, site: dict[str, str]) -> None:
    flags = "--container-mounts=/* --cpu-bind=cores\n  --wait=7"
    run_script("train.sh", "r.yaml", **site, MEGAM3_SRUN_FLAGS=flags)
    given, _ = started(tmp_path)
    assert given[1:4] == ["--container-mounts=/*", "--cpu-bind=cores", "--wait=7"]


def test_fewer_cores_than_ranks_are_said(tmp_path: Path, site: dict[str, str]) -> None:
    """`--gpus-per-node 8` alone: Slurm gives as many cores as it likes."""
    given = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NUM_NODES": "2"}
    done = run_script("train.sh", "r.yaml", **site, **given)
    assert "2 cores for 8 ranks on a node: they share them; add --cpus-per-gpu to the line of" in done.stderr
    call = next(json.loads(line)[0] for line in (tmp_path / "srun.log").read_text().splitlines())
    assert call[:3] == ["--ntasks-per-node=8", "--ntasks=16", "--overcommit"]


def test_without_flags_there_are_none(tmp_path: Path, site: dict[str, str]) -> None:
    (tmp_path / "env.sh").write_text("MEGAM3_SRUN_FLAGS=\nMEGAM3_MAX_REQUEUES=1\nMEGAM3_MAX_RESTARTS=1\n")
    with (tmp_path / "env.sh").open("a") as stream:
        stream.write("MEGAM3_RANK_LOGS=\nMEGAM3_MODULE=m\n")
    done = run_script("train.sh", "r.yaml", **site, MEGAM3_SLURM_ENV=str(tmp_path / "env.sh"))
    assert done.returncode == 0, done.stderr
    assert started(tmp_path)[0][:2] == ["--label", f"{sys.prefix}/bin/python"]


def test_an_environment_inside_a_container_is_not_looked_for_outside(
    tmp_path: Path, site: dict[str, str]
) -> None:
    inside = {**site, "MEGAM3_VENV": "/opt/in the image", "MEGAM3_SRUN_FLAGS": "--container-image=m.sqsh"}
    done = run_script("train.sh", "r.yaml", **inside)
    assert done.returncode == 0, done.stderr
    assert "/opt/in the image/bin/python" in started(tmp_path)[0]
    done = run_script("prepare.sh", "r.yaml", **inside)
    assert (done.returncode, "no /opt/in the image/bin/python: run make once" in done.stderr) == (2, True)


@pytest.mark.parametrize("script", ["train.sh", "prepare.sh", "mine.sh"])
def test_wrong_places_are_told(tmp_path: Path, script: str) -> None:
    elsewhere = {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = run_script(script, "x", at=tmp_path, **elsewhere)
    said = f"slurm/{script}: no slurm/start.sh in {tmp_path}: submit from the top of the checkout\n"
    assert (done.returncode, done.stderr) == (2, said)
    done = run_script(script, "x", **elsewhere, MEGAM3_SLURM_ENV="no such/env.sh")
    said = f"slurm/{script}: no no such/env.sh in {ROOT}: MEGAM3_SLURM_ENV names the site settings\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_no_shell_is_started_from_python() -> None:
    """Values of a recipe never meet one."""
    words = ("shell=True", "os.system(", "os.popen(", " eval(", " exec(")
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in (ROOT / "megam3").rglob("*.py")
        for word in words
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []
