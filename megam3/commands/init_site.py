"""`megam3 init-site DIR`: write out the files that a site edits, as an installed package brings them.

    DIR/slurm/       train.sh, prepare.sh, mine.sh, their settings env.sh, install.sh, Dockerfile, …
    DIR/recipes/     the packaged recipes, each field of which an override can also change
    DIR/ds_configs/  the memory strategies; a recipe may name a file of its own instead

No file that is there already is changed: then nothing is written at all. Submit from DIR:
`cd DIR && sbatch slurm/train.sh recipes/unified.yaml …`. env.sh names the environment this command ran in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import megam3
from megam3.errors import ConfigError
from megam3.files import atomic_file

KINDS = {"slurm": ("*.sh", "Dockerfile", "megam3.def"), "recipes": ("*.yaml",), "ds_configs": ("*.json",)}
"""Folder -> the files it brings."""
_VENV_LINE = ': "${MEGAM3_VENV:=.venv}"'


def main(argv: Sequence[str]) -> int:
    """Write the files, and say how to begin.

    Raises:
        ConfigError: a file is there already, or the folder cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 init-site", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", help="folder to fill; made when it is not there")
    folder = Path(parser.parse_args(argv).folder).expanduser()
    files = dict(site_files())
    present = [name for name in files if (folder / name).exists()]
    if present:
        rule = (
            f"holds {', '.join(present[:3])}{' …' if len(present) > 3 else ''} already; nothing was written"
        )
        raise ConfigError("DIR", str(folder), rule, "name another folder, or move these files away")
    write_site(folder, files)
    print(f"{len(files)} files in {folder}; look through slurm/env.sh, then, in {folder}:")
    print("  sbatch slurm/train.sh recipes/unified.yaml model.path=… data.train.0.paths='[…]'")
    return 0


def template_folder(kind: str) -> Path:
    """Where a kind of files lies: inside the package, or at the top of a source checkout."""
    package = Path(megam3.__file__).resolve().parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def site_files() -> Iterator[tuple[str, Path]]:
    """(name below DIR, file it is copied from)."""
    for kind, patterns in KINDS.items():
        place = template_folder(kind)
        for pattern in patterns:
            for file in sorted(place.glob(pattern)):
                yield f"{kind}/{file.name}", file


def write_site(folder: Path, files: dict[str, Path]) -> None:
    """Write all; scripts can be executed.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        for name, source in files.items():
            text = source.read_text(encoding="utf-8")
            if name == "slurm/env.sh":
                # sbatch runs on another machine without an activated environment: name this one
                text = text.replace(_VENV_LINE, f': "${{MEGAM3_VENV:={sys.prefix}}}"')
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target, "w") as stream:
                stream.write(text)
            if name.endswith(".sh") and name != "slurm/env.sh":
                target.chmod(target.stat().st_mode | 0o111)
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise ConfigError("DIR", str(folder), rule, "name a folder you may write") from None
