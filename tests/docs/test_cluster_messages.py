"""The troubleshooting table of docs/cluster.md: each message is one that the code says and that a test
provokes and reads."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = re.compile(
    r"…|'[^']*'|\b[\w.,]*\d[\w.,]*\b|\b(?:HOST|W|N)\b|[:;,()=]"  # what differs from run to run, and signs
)


def table() -> list[str]:
    """The messages of its first column."""
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    section = text.partition("## Messages met here")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def joined(paths: list[Path]) -> str:
    """Their text with literals that stand side by side made one, without the backslashes of patterns."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    text = re.sub(r"([\"'])\s*\n?\s*[rf]{0,2}\1", "", text)
    return re.sub(r"\s+", " ", text.replace("\\", ""))


SOURCES = joined([*(ROOT / "megam3").rglob("*.py"), *(ROOT / "slurm").glob("*.sh")])
TESTS = joined([path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)])


def fragments(message: str) -> list[str]:
    """Its constant parts of two words and more, the longest first."""
    parts = [part.strip() for part in PLACEHOLDER.split(message)]
    return sorted((part for part in parts if len(part.split()) > 1), key=len, reverse=True)


def test_the_table_is_read() -> None:
    assert len(table()) > 30
    said = "no progress for 1800 s in step 13, update: rank 1 on gpu08 is silent"
    assert fragments(said) == ["no progress for", "s in step", "is silent"]


@pytest.mark.parametrize("message", table())
def test_a_test_reads_each_message(message: str) -> None:
    found = fragments(message) or [message]
    assert any(part in TESTS for part in found), f"none of {found} is read by a test"


@pytest.mark.parametrize("message", table())
def test_the_code_says_each_message(message: str) -> None:
    found = fragments(message) or [message]
    from_elsewhere = ("Read-only file system", "File name too long", "No space left on device")
    assert any(part in SOURCES or part in from_elsewhere for part in found), f"nothing says one of {found}"
