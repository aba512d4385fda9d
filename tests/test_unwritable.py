"""Paths that cannot be: too long, on a read-only disk, through a file. One message that names the path,
code 2, no traceback."""

import subprocess
from collections.abc import Iterator

import pytest

from megam3.cli import main
from tests.launches import Workplace, make_workplace, train_calls
from tests.ranks import run_ranks

LONG_NAME = "n" * 300
LONG_PATH = "/".join(["a folder"] * 600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("unwritable")
    read_only = folder / "read-only"
    read_only.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(read_only)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        yield make_workplace(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(read_only)], check=False)


OVERRIDES = {
    "output_dir read-only": ("output_dir={0}/read-only", "read-only", "Read-only file system"),
    "output_dir below read-only": ("output_dir={0}/read-only/runs", "read-only", "Read-only file system"),
    "output_dir long name": (f"output_dir={{0}}/{LONG_NAME}", "nnnnn", "File name too long"),
    "output_dir long path": (f"output_dir={{0}}/{LONG_PATH}", "a folder/a folder", "File name too long"),
    "output_dir is a file": (
        "output_dir={0}/recipe.yaml",
        "recipe.yaml",
        "is a file, and the run wants a folder",
    ),
    "store_dir read-only": ("data.store_dir={0}/read-only/s", "read-only/s", "Read-only file system"),
    "store_dir long name": (f"data.store_dir={{0}}/{LONG_NAME}", "nnnnn", "File name too long"),
    "store_dir is a file": ("data.store_dir={0}/recipe.yaml", "recipe.yaml", "Not a directory"),
    "model.path long name": (f"model.path={{0}}/{LONG_NAME}", "nnnnn", "File name too long"),
    "data path long name": (f"data.train.0.paths=[{{0}}/{LONG_NAME}.jsonl]", "nnnnn", "File name too long"),
    "evaluation long name": (f"evaluation.folders=[{{0}}/{LONG_NAME}]", "nnnnn", "File name too long"),
    "dataset name long": (f"data.train.0.name={LONG_NAME}", "nnnnn", "File name too long"),
}


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    made = [
        {
            "name": name,
            "arguments": [place.recipe, "name=run", "train.steps=1", override.format(place.folder)],
        }
        for name, (override, *_) in OVERRIDES.items()
    ]
    return run_ranks(train_calls, 1, made)[0]


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_recipes_path_that_cannot_be_is_one_message(calls: dict[str, dict], name: str) -> None:
    _, path, reason = OVERRIDES[name]
    said = calls[name]["said"]
    assert calls[name]["code"] == 2, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1, said
    assert path in errors[0]
    assert reason in errors[0]
    assert len(errors[0]) < 5000


COMMANDS = {
    "prepare": ("prepare", "{recipe}", f"data.store_dir={{0}}/{LONG_NAME}"),
    "prepare read-only": ("prepare", "{recipe}", "data.store_dir={0}/read-only/s"),
    "import": ("import", "{0}/model", "{0}/read-only/m", "--new-heads"),
    "import long": ("import", "{0}/model", f"{{0}}/{LONG_NAME}", "--new-heads"),
    "extend-positions": ("extend-positions", "{0}/model", "{0}/read-only/m", "--max-tokens", "600"),
    "merge": ("merge", "{0}/model", "{0}/model", f"{{0}}/{LONG_NAME}"),
    "init-site": ("init-site", "{0}/read-only/site"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_output_that_cannot_be_is_one_message(
    place: Workplace, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = [part.format(place.folder, recipe=place.recipe) for part in COMMANDS[name]]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("megam3: error: ") == 1
    assert "File name too long" in said or "Read-only file system" in said
