"""A long map over input files in parts that are whole or absent: killed and started again, it continues.

    PARTS/00007.jsonl     the output of input unit 7, then 00007.json: its counts, once it is complete
    OUTPUT                all parts in order, written aside and renamed; PARTS is removed then

Every rank takes every W-th unit; rank 0 joins them. The name of PARTS holds a digest of inputs and settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from megam3.data.source import Unit
from megam3.dist import comm
from megam3.errors import DataError
from megam3.files import atomic_file, read_json, write_json

Emit = Callable[[dict], None]
"""Takes one record of the output."""
PART_BYTES = 4 << 20
"""Input text of one part: some thousand records, minutes of work."""


def digest(*values: object) -> str:
    """Short name of some JSON values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def on_main(compute: Callable[[], str]) -> str:
    """A string computed on rank 0, known to all."""
    return comm.gather_objects_json(compute() if comm.is_main() else "")[0]


def map_units(
    units: Sequence[Unit],
    folder: Path,
    work: Callable[[Unit, Emit], dict],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Do the units of this rank that are not done: `work` emits the records of a unit and returns its counts
    (as JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    own = range(comm.rank(), len(units), comm.world_size())
    for done, number in enumerate(own, 1):
        counts_file = folder / f"{number:05d}.json"
        if not counts_file.exists():
            with atomic_file(folder / f"{number:05d}.jsonl", "w") as stream:
                counts = work(units[number], lambda record: _write(stream, record))
            write_json(counts_file, counts)
        if on_progress is not None:
            on_progress(done, len(own))


def _write(stream: IO[str], record: dict) -> None:
    stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def join_parts(num_units: int, folder: Path, output: Path) -> list[dict]:
    """Write all parts, in order, to `output`, and remove them; rank 0 writes after all ranks have come here.

    Returns:
        The counts of every part, on every rank.
    """
    comm.barrier()
    counts = [read_json(folder / f"{number:05d}.json") for number in range(num_units)]
    comm.barrier()
    if comm.is_main():
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as stream:
            for number in range(num_units):
                with open(folder / f"{number:05d}.jsonl", "rb") as part:
                    shutil.copyfileobj(part, stream)
        shutil.rmtree(folder)
    comm.barrier()
    return counts


def refuse_existing(output: Path) -> None:
    """Raises DataError when `output` is there already."""
    if output.exists():
        raise DataError("output", str(output), "exists already", "remove it, or choose another name")
