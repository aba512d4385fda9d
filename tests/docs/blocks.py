"""Commands and code of README.md and docs/*.md, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED_COMMAND = re.compile(
    r"^ {4}((?:\w+=\S+ )*(?:megam3|deepspeed|mpirun|sbatch|python) .*)$", re.MULTILINE
)
LAUNCHED = re.compile(r"(?:--module megam3\.train|-m megam3\.train|slurm/train\.sh|tools/train\.py) (.*)")
"""What stands behind a launcher's own options: the arguments of `megam3 train`."""
SCRIPTS = {"slurm/prepare.sh": "prepare", "slurm/mine.sh": "mine"}


@dataclass(frozen=True)
class Command:
    """A line of a shell block, and where it stands."""

    page: str
    line: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"

    def megam3_arguments(self) -> list[str] | None:
        """What `megam3` would be given, subcommand first; None for other programs."""
        words = shlex.split(self.line, comments=True)
        # what the shell takes for itself
        words = words[: next((i for i, word in enumerate(words) if word in ("<", ">", "|", "&&")), None)]
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["megam3"]:
            return words[1:]
        if words[:3] == ["python", "-m", "megam3"]:
            return words[3:]
        launched = LAUNCHED.search(self.line)
        if launched:
            return ["train", *shlex.split(launched[1], comments=True)]
        for script, name in SCRIPTS.items():
            if script in words:
                return [name, *words[words.index(script) + 1 :]]
        return None


def fences(page: Path, kind: str) -> list[str]:
    """Contents of a page's fenced blocks of one kind, in order."""
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found == kind]


def commands(page: Path) -> Iterator[Command]:
    """Lines of `sh` fences, and indented lines that begin with a program of ours or a launcher."""
    name = page.relative_to(ROOT).as_posix()
    for body in fences(page, "sh"):
        for line in body.splitlines():
            if line.strip():
                yield Command(name, line.strip())
    for line in INDENTED_COMMAND.findall(page.read_text(encoding="utf-8")):
        yield Command(name, line)


def named_options(page: Path) -> Iterator[tuple[str, str]]:
    """(subcommand, option) of every `megam3 NAME … --option` in running text."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`megam3 ([^`]+)`", text):
        name, *words = span.split()
        yield name, ""
        yield from ((name, word.split("=")[0]) for word in words if re.fullmatch(r"--[a-z][a-z-]*", word))
