"""The command: exit codes, messages without tracebacks, and what show-config prints."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megam3.cli import SUBCOMMANDS, main, report_user_errors
from megam3.config.load import load_config
from megam3.errors import DataError


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
    assert load_config(path) == load_config("unified", ["optim.lr=2e-5", "train.seed=3"])
    assert "# One step on 8 ranks:" in text
    assert "#          500    1 152     144            1 152        648 000      10" in text
    assert "# DeepSpeed (zero3_8k):" in text
    assert '#   "train_batch_size": 8,' in text


def test_a_user_error_is_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "unified", "optim.learning_rate=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "megam3: error: optim.learning_rate (override optim.learning_rate=1) = 1: unknown key in optim; did you mean optim.lr?\n"
    )


def test_missing_files_are_told_after_the_recipe_was_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show-config", "unified"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("name: unified\n")
    assert "model.path = 'models/encoder': no such folder" in captured.err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "--list"]) == 0
    assert {"quickstart", "unified"} <= set(capsys.readouterr().out.split())


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
    assert all(name in text for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_its_main(name: str) -> None:
    source = importlib.util.find_spec(SUBCOMMANDS[name].module)
    assert source is not None
    assert source.origin is not None
    assert "def main(argv" in Path(source.origin).read_text()


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


def test_show_config_touches_neither_torch_nor_deepspeed() -> None:
    code = "import sys; from megam3.cli import main; main(['show-config', 'unified', '--no-files']); "
    code += "sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
