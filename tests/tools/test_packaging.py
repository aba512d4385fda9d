"""The wheel outside a checkout: what it brings, `megam3 init-site`, the container's steps, every Python."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import requires
from pathlib import Path

import pytest

from megam3.cli import main

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SITE_FILES = {
    f"{folder}/{file.name}"
    for folder, place in (("slurm", "slurm"), ("ds_configs", "ds_configs"), ("recipes", "megam3/recipes"))
    for file in (ROOT / place).iterdir()
    if file.suffix in (".sh", ".json", ".yaml", ".def") or file.name == "Dockerfile"
}


def run(
    *command: object, cwd: Path, check: bool = True, **environ: str
) -> "subprocess.CompletedProcess[str]":
    """Without the checkout on the path."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environ, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a copy, because building leaves folders behind
    source = tmp_path_factory.mktemp("source") / "megam3"
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "megam3", "ds_configs", "slurm"]
    for name in names:
        place = ROOT / name
        copy = shutil.copytree if place.is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(place, source / name)
    out = source.parent / "dist"
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", out, "."),
        cwd=source,
    )
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A fresh environment made by the container's script; it reads torch and the others from this one."""
    place = tmp_path_factory.mktemp("site") / "env"
    run(sys.executable, "-m", "venv", place, cwd=place.parent)
    packages = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # last on the path, so that what is installed here wins
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run("bash", ROOT / "slurm/install.sh", place, wheel, cwd=place.parent, PIP_FLAGS="--quiet --no-deps")
    where = run(place / "bin/python", "-c", "import megam3; print(megam3.__file__)", cwd=place.parent).stdout
    assert str(packages) in where
    return place


def test_the_site_of_an_installed_package(environment: Path, tmp_path: Path) -> None:
    run(environment / "bin/megam3", "init-site", "site", cwd=tmp_path)
    site = tmp_path / "site"
    assert {str(file.relative_to(site)) for file in site.rglob("*") if file.is_file()} == SITE_FILES
    assert f'"${{MEGAM3_VENV:={environment}}}"' in (site / "slurm/env.sh").read_text()
    assert os.access(site / "slurm/train.sh", os.X_OK)
    # its own files serve: the recipe by path, the template by path
    shown = run(
        *(environment / "bin/megam3", "show-config", "recipes/unified.yaml", "--no-files"),
        "engine.template=ds_configs/zero3.json",
        cwd=site,
    ).stdout
    assert '"stage": 3' in shown
    # and the script gets as far as Slurm
    done = run("bash", "slurm/train.sh", cwd=site, check=False)
    assert done.returncode == 2
    assert "a recipe is required" in done.stderr


def test_every_command_of_an_installed_package_has_its_module(environment: Path, tmp_path: Path) -> None:
    script = (
        "import importlib.util, megam3.cli as cli\n"
        "print([c.module for c in cli.SUBCOMMANDS.values() if not importlib.util.find_spec(c.module)])"
    )
    assert run(environment / "bin/python", "-c", script, cwd=tmp_path).stdout == "[]\n"


def test_a_site_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init-site", str(tmp_path / "site")]) == 0
    assert "sbatch slurm/train.sh" in capsys.readouterr().out
    settings = tmp_path / "site/slurm/env.sh"
    settings.write_text("mine")
    (tmp_path / "site/slurm/train.sh").unlink()
    assert main(["init-site", str(tmp_path / "site")]) == 2
    message = capsys.readouterr().err
    assert "already; nothing was written; name another folder" in message
    assert settings.read_text() == "mine"
    assert not (tmp_path / "site/slurm/train.sh").exists()


def test_a_site_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["init-site", str(tmp_path / "file" / "site")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_install_script_says_what_is_missing(tmp_path: Path) -> None:
    for arguments, message in (([], "two arguments are required"), (["env", "no.whl"], "no wheel no.whl")):
        done = run("bash", ROOT / "slurm/install.sh", *arguments, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "megam3.def"])
def test_container_files_copy_what_is_there_and_run_the_script(name: str) -> None:
    text = (ROOT / "slurm" / name).read_text()
    assert "install.sh /opt/megam3" in text
    for file in re.findall(r"(?:slurm|recipes)/[\w.-]+\.(?:sh|def)\b|slurm/Dockerfile", text):
        assert (ROOT / file).is_file(), file


def requirements() -> list[str]:
    """Of the library and its extras; DeepSpeed, which comes as source alone, by its own."""
    calls = [n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(n, ast.Call)]
    setup = next(call for call in calls if getattr(call.func, "id", "") == "setup")
    values = {item.arg: item.value for item in setup.keywords}
    own = [*ast.literal_eval(values["install_requires"])]
    extras = ast.literal_eval(values["extras_require"])
    own += [line for extra in ("dev", "docs", "wandb", "mlflow", "lora") for line in extras[extra]]
    return [
        *(line for line in own if not re.match("deepspeed|triton", line)),
        *(line for line in requires("deepspeed") or [] if "extra ==" not in line),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_pinned_versions_have_builds_for_every_python(version: str, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    # pip evaluates the markers of constraints for the Python it runs in, uv for the one that is asked for
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("no uv on the path (pip install uv)")
    done = run(
        *(uv, "pip", "compile", "--quiet", "--no-build", "--python-version", version),
        *("--python-platform", "x86_64-manylinux_2_28"),
        *("--constraint", ROOT / "constraints.txt", "requirements.txt"),
        cwd=tmp_path,
        check=False,
    )
    if "Failed to fetch" in done.stderr:
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
