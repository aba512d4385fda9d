import pytest

from megam3.cli import main
from megam3.commands.prepare import parse_shard


def test_a_shard_is_one_task_of_an_array() -> None:
    assert parse_shard("3/16") == (3, 16)
    assert parse_shard("0/1") == (0, 1)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/4", "1/0", ""])
def test_a_shard_that_is_none_is_told_before_anything_is_read(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "no-such-recipe", f"--shard={text}"]) == 2
    assert capsys.readouterr().err == (
        f"megam3: error: --shard = {text!r}: must be I/N with I below N, from 0; "
        "write --shard 0/4 for the first task of four\n"
    )
