"""env.json: which code ran, on what; and nothing that is nobody's business."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megam3.obs.environment import CodeRevision, code_revision, describe_environment, package_versions


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("one = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_the_commit_and_whether_tracked_files_differ(package: Path) -> None:
    commit = git(package, "rev-parse", "HEAD")
    assert code_revision(package) == CodeRevision(commit, False)
    (package / "notes.txt").write_text("not tracked")
    assert code_revision(package) == CodeRevision(commit, False)
    (package / "__init__.py").write_text("one = 2\n")
    assert code_revision(package) == CodeRevision(commit, True)


def test_an_installed_package_has_no_revision_also_below_a_checkout(package: Path, tmp_path: Path) -> None:
    installed = package / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert code_revision(installed) is None
    assert code_revision(tmp_path) is None
    assert code_revision(tmp_path / "nowhere") is None


def test_without_git_there_is_no_revision(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_revision(package) is None


def test_versions_of_all_requirements() -> None:
    versions = package_versions()
    for name in ("torch", "deepspeed", "transformers", "numpy", "safetensors", "pyarrow", "pydantic"):
        assert versions[name] == version(name)


def test_no_variable_of_the_environment_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOMETHING_ELSE"):
        monkeypatch.setenv(name, f"hidden-{name}")
    described = json.dumps(describe_environment(torch.device("cpu")))
    assert "hidden-" not in described
    assert "HF_TOKEN" not in described
