"""Completion, asked of a real bash; and the script that zsh reads."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megam3.cli import SUBCOMMANDS, main
from megam3.commands.completion import PASSED_ON, script

BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="no bash on this machine")

ASK = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_megam3 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    (folder / "megam3.bash").write_text(script("bash"))
    (folder / "mine.yaml").touch()
    return folder / "megam3.bash"


def completed(bash_script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    assert BASH is not None
    line = " ".join(f"'{word}'" for word in ("megam3", *words))
    code = ASK.format(script=bash_script, words=line)
    done = subprocess.run(
        [BASH, "--norc", "-c", code], cwd=bash_script.parent, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return [word for word in done.stdout.splitlines() if word]


@needs_bash
def test_subcommands(bash_script: Path) -> None:
    assert completed(bash_script, "plan") == ["plan-epochs", "plan-memory"]
    assert set(SUBCOMMANDS) < set(completed(bash_script, ""))


@needs_bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["plan-memory", "r.yaml", "--gpu"], ["--gpus", "--gpu-memory"]),
        (["evaluate", "model", "beir", "--by", "l"], ["language", "length"]),
        (["completion", ""], ["bash", "zsh"]),
        (["train", "finet"], ["finetune"]),
        (["train", "mi"], ["mine.yaml"]),
        (["train", "mine.yaml", "optim.l"], ["optim.lr=", "optim.lexical_lr=", "optim.layer_decay="]),
        (["explain", "lexical/non"], ["lexical/nonzero_share"]),
        (["export", "mi"], ["mine.yaml"]),
        (["nonsense", ""], []),
    ],
)
def test_options_values_recipes_and_fields(bash_script: Path, words: list[str], offered: list[str]) -> None:
    assert sorted(completed(bash_script, *words)) == sorted(offered)


@needs_bash
def test_every_option_of_every_subcommand(bash_script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in set(SUBCOMMANDS) - set(PASSED_ON):
        offered = completed(bash_script, name, "--")
        with pytest.raises(SystemExit):
            main([name, "--help"])
        told = capsys.readouterr().out
        assert "--help" in offered
        assert all(option in told for option in offered), name


def test_the_script_of_zsh_reads_it_through_bashcompinit() -> None:
    text = script("zsh")
    assert text.splitlines()[0] == "#compdef megam3"
    assert "bashcompinit" in text
    assert text.rstrip().endswith("complete -o filenames -F _megam3 megam3")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    (tmp_path / "_megam3").write_text(script("zsh"))
    code = f"autoload -U compinit && compinit -D && source {tmp_path}/_megam3 && print ${{_comps[megam3]}}"
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, env={**os.environ})
    assert (done.stdout.strip(), done.returncode) != ("", 0), done.stderr


def test_it_is_printed_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash")
    with pytest.raises(SystemExit) as ended:
        main(["completion", "fish"])
    assert ended.value.code == 2
