"""The command: exit codes, messages without tracebacks, and what show-config prints."""

import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import megam3
from megam3 import __version__
from megam3.cli import GROUPS, SUBCOMMANDS, main, report_user_errors
from megam3.config.load import RECIPE_DIR, load_config, recipe_names
from megam3.errors import DataError
from tests.recipes import write_encoder_config


def test_show_config_prints_a_recipe_that_loads_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        main(["show-config", "unified", "optim.lr=2e-5", "--no-files", "--world-size", "8", "train.seed=3"])
        == 0
    )
    text = capsys.readouterr().out
    path = tmp_path / "resolved.yaml"
    path.write_text(text)
    # what `auto` decides is written out: without GPUs stage 2 for several ranks (megam3/planning/choice.py)
    decided = [
        "engine.template=zero2",
        "engine.gradient_reduction=every_pass",
        "data.batch.chunk_tokens=65536",
    ]
    assert load_config(path) == load_config("unified", ["optim.lr=2e-5", "train.seed=3", *decided])
    assert "# One step on 8 ranks:" in text
    assert "#          500    1 152     144            1 152        648 000      10" in text
    assert "# DeepSpeed (zero2):" in text
    assert '#   "train_batch_size": 8,' in text


def test_show_config_prints_the_weights_that_training_uses(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["show-config", "unified", "--no-files", "objective.preset=m3"]
    assert main([*argv, "objective.loss_weights.dense=1"]) == 0
    overridden = capsys.readouterr().out
    assert "#   losses             dense 1  lexical 0.1  multi_vector 1  sum 1\n" in overridden
    assert "#   combined score     dense 1  lexical 0.3  multi_vector 1\n" in overridden
    assert main([*argv, "objective.preset=joint", "objective.heads=[dense]"]) == 0
    alone = capsys.readouterr().out
    assert "#   losses             dense 1  lexical 0  multi_vector 0  sum 0\n" in alone
    assert "#   self-distillation  off\n" in alone


def test_a_user_error_is_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "unified", "optim.learning_rate=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "megam3: error: optim.learning_rate (override optim.learning_rate=1) = 1: unknown key in optim; "
        "did you mean optim.lr?\n"
    )


def test_missing_files_are_told_after_the_recipe_was_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megam3.model.hub.snapshot_download", _offline)
    (tmp_path / "mine.yaml").write_text((RECIPE_DIR / "unified.yaml").read_text())
    assert main(["show-config", "mine.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("name: unified\n")
    assert "'models/encoder': no such folder, and the hub cannot be reached" in captured.err
    assert "data.train.0.paths.0 = " in captured.err


def _offline(*_: object, **__: object) -> str:
    raise ConnectionError("no route")


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_packaged_recipe_is_shown_with_what_it_leaves_to_its_reader(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megam3.model.hub.snapshot_download", _offline)
    assert main(["show-config", recipe, "--world-size", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (_, told) = captured.out.split(
        "# To train it, say where these are, in a copy of the recipe or as key=value:\n"
    )
    assert told.splitlines()[0].split() == ["#", "model.path", "now", load_config(recipe).model.path]
    assert "data.train.0.paths.0" in told
    # its own mistakes are no stand-ins
    assert main(["show-config", recipe, "--world-size", "8", "model.path=elsewhere"]) == 2
    assert "model.path = 'elsewhere': no such folder" in capsys.readouterr().err


def test_a_model_of_the_hub_is_shown_without_fetching_its_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_encoder_config(tmp_path / "models--owner--name" / "snapshots" / "5617a9f")
    fetched = []

    def download(name: str, **options: Any) -> str:
        fetched.append((name, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr("megam3.model.hub.snapshot_download", download)
    (tmp_path / "pairs.jsonl").touch()
    argv = [
        "show-config",
        "finetune",
        "model.path=owner/name",
        f"data.train.0.paths=[{tmp_path}/pairs.jsonl]",
    ]
    assert main(argv) == 0
    assert "path: owner/name" in capsys.readouterr().out
    ((name, patterns),) = fetched
    assert (name, "*.json" in patterns) == ("owner/name", True)
    assert not [pattern for pattern in patterns if "safetensors" in pattern or "bin" in pattern]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "--list"]) == 0
    assert capsys.readouterr().out.split() == sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["show-config"], "a recipe is required"), (["show-config", "x", "--world-size", "0"], "at least 1")],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and command.about in text for name, command in SUBCOMMANDS.items())
    assert all(f"\n{heading}:\n" in text for heading in GROUPS)


def test_an_unknown_subcommand_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["exprot", "x"])
    assert caught.value.code == 2
    assert "there is no subcommand 'exprot'; did you mean export?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["zzz"])
    assert "use one of: quickstart, show-config, explain, " in capsys.readouterr().err


def test_python_m_megam3_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "megam3", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"megam3 {__version__}\n")


@pytest.fixture
def train_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(argv: list[str]) -> int:
        calls.append(argv)
        return 85

    monkeypatch.setitem(sys.modules, "megam3.train", types.SimpleNamespace(main=run))
    return calls


def test_train_hands_recipe_and_overrides_over_and_returns_its_code(train_calls: list[list[str]]) -> None:
    assert main(["train", "my.yaml", "optim.lr=2e-5", "optim.clip_norm=-1"]) == 85
    assert train_calls == [["my.yaml", "optim.lr=2e-5", "optim.clip_norm=-1"]]


def test_train_without_a_recipe_or_with_an_unknown_option_starts_nothing(
    capsys: pytest.CaptureFixture[str], train_calls: list[list[str]]
) -> None:
    for argv, expected in ([], "RECIPE"), (["my.yaml", "--lr", "3"], "--lr"):
        with pytest.raises(SystemExit) as caught:
            main(["train", *argv])
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err
    assert train_calls == []


def test_quickstart_without_its_checkout_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megam3, "__file__", str(tmp_path / "site-packages" / "megam3" / "__init__.py"))
    assert main(["quickstart"]) == 2
    assert capsys.readouterr().err == (
        f"megam3: error: quickstart = '{tmp_path}/site-packages/examples/quickstart/run.py': is an example "
        "in megam3's repository, which an installed package does not bring; "
        "clone the repository and run `make quickstart` in it\n"
    )


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_its_main(name: str) -> None:
    source = importlib.util.find_spec(SUBCOMMANDS[name].module)
    assert source is not None
    assert source.origin is not None
    assert "def main(argv: Sequence[str]" in Path(source.origin).read_text()


def test_help_of_a_subcommand_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show-config", "--help"])
    assert "--world-size" in capsys.readouterr().out


def test_our_own_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def user_error(argv: Sequence[str]) -> int:
        raise DataError("a.jsonl:3", "{", "is not valid JSON", "correct the line")

    def bug(argv: Sequence[str]) -> int:
        raise KeyError("x")

    assert report_user_errors(user_error, []) == 2
    assert capsys.readouterr().err == "megam3: error: a.jsonl:3 = '{': is not valid JSON; correct the line\n"
    with pytest.raises(KeyError):
        report_user_errors(bug, [])


@pytest.mark.parametrize(
    "argv", [["show-config", "unified", "--no-files"], ["--help"], ["train", "--help"]], ids=" ".join
)
def test_light_commands_touch_neither_torch_nor_deepspeed(argv: list[str]) -> None:
    code = f"""
import contextlib, sys
from megam3.cli import main
with contextlib.suppress(SystemExit):
    main({argv})
sys.exit(bool({{'torch', 'deepspeed'}} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_conversion_says_nothing_of_accelerators(tmp_path: Path, command: str) -> None:
    (tmp_path / "model").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    argv = [sys.executable, "-m", "megam3", command, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    # it got as far as reading the folder, with everything imported
    assert done.returncode == 2
    assert done.stderr.startswith("megam3: error: ")
    assert "accelerator" not in done.stdout + done.stderr
