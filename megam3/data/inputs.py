"""What a dataset was begun from, and whether a recipe still means that.

An input is recognised by its size and its contents, not by its path or its date: data that was moved to
another disk, or copied, is the data it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from megam3.data.encode import input_digest
from megam3.data.manifest import InputFile, StoreSpec, TextRules
from megam3.data.source import ForwardReader, format_of, split_file

DigestOf = Callable[[int], str | None]
"""What unit N held when it was prepared; None while it is not."""


def recognise(spec: StoreSpec, inputs: Mapping[str, InputFile], digest_of: DigestOf) -> StoreSpec:
    """`spec` with the present paths and dates of those of its inputs that are among `inputs`; the others stay
    as they were, for `changes` to name.

    Contents are read where path or date differ, of the units that are prepared.
    """
    now: dict[str, str] = {}
    for path in spec.inputs:
        moved = [other for other in inputs if other not in spec.inputs and other not in now.values()]
        # the same name first: of many files of one size it is the likely one
        moved.sort(key=lambda other: Path(other).name != Path(path).name)
        for other in [path] if path in inputs else moved:
            if inputs[other] == spec.inputs.get(other) or _is_same(spec, path, other, inputs, digest_of):
                now[path] = other
                break
    present = {now.get(path, path): inputs.get(now.get(path, ""), was) for path, was in spec.inputs.items()}
    units = [unit._replace(path=now.get(unit.path, unit.path)) for unit in spec.units]
    return spec.model_copy(update={"inputs": present, "units": units})


def appended(spec: StoreSpec, inputs: Mapping[str, InputFile], digest_of: DigestOf) -> StoreSpec:
    """`spec` with units for files that came to `inputs`, and for lines that came to the end of JSONL files;
    the units that were there keep their numbers and shards.

    A file has grown when it is longer and all that was prepared of it is still there, byte for byte; any
    other change is left for `changes` to name.
    """
    units, known = list(spec.units), dict(spec.inputs)
    for path, now in inputs.items():
        before = spec.inputs.get(path)
        if before is None:
            units += split_file(path, spec.unit_bytes)
        elif now != before and now.num_bytes >= before.num_bytes and _only_grew(spec, path, digest_of):
            units += split_file(path, spec.unit_bytes, start=before.num_bytes)
        else:
            continue
        known[path] = now
    return spec.model_copy(update={"inputs": known, "units": units})


def prepared_part(spec: StoreSpec, digest_of: DigestOf) -> StoreSpec:
    """`spec` without the units behind the last one that is prepared: whoever mends a bad record, which ended
    the preparation, has changed nothing that the store holds.

    Unchanged where that would cut a file that can only be cut as a whole.
    """
    numbers = [number for number in range(len(spec.units)) if digest_of(number) is not None]
    units = spec.units[: numbers[-1] + 1 if numbers else 0]
    inputs = dict(spec.inputs)
    for path in {unit.path for unit in spec.units[len(units) :]}:
        kept = [unit for unit in units if unit.path == path]
        if kept and format_of(path) != "jsonl":
            return spec
        del inputs[path]
        if kept:
            inputs[path] = InputFile(kept[-1].stop, 0)
    return spec.model_copy(update={"inputs": inputs, "units": units})


def changes(recognised: StoreSpec, wanted: StoreSpec) -> list[str]:
    """In which ways the recipe is no longer what the dataset was begun from."""
    found = [
        f"{name} was {getattr(recognised, name)!r}, is {getattr(wanted, name)!r}"
        for name in ("tokenizer", *TextRules.model_fields)
        if getattr(recognised, name) != getattr(wanted, name)
    ]
    found += [f"{path} was not there" for path in wanted.inputs if path not in recognised.inputs]
    found += [f"{path} is gone" for path in recognised.inputs if path not in wanted.inputs]
    for path in (path for path in wanted.inputs if path in recognised.inputs):
        before, after = recognised.inputs[path], wanted.inputs[path]
        if before.num_bytes != after.num_bytes:
            found.append(f"{path} had {before.num_bytes} bytes, has {after.num_bytes}")
        elif before != after:
            found.append(f"{path} has other contents")
    return found


def _is_same(
    spec: StoreSpec, path: str, other: str, inputs: Mapping[str, InputFile], digest_of: DigestOf
) -> bool:
    if inputs[other].num_bytes != spec.inputs[path].num_bytes or format_of(other) != format_of(path):
        return False
    return _holds(spec, path, other, digest_of)


def _only_grew(spec: StoreSpec, path: str, digest_of: DigestOf) -> bool:
    # a last line without a line break, which more text would make another one, has another digest then
    return format_of(path) == "jsonl" and _holds(spec, path, path, digest_of)


def _holds(spec: StoreSpec, path: str, other: str, digest_of: DigestOf) -> bool:
    """Whether `other` holds what was prepared of `path`."""
    with closing(ForwardReader()) as reader:
        for number, unit in enumerate(spec.units):
            expected = digest_of(number) if unit.path == path else None
            if expected is not None and input_digest(unit._replace(path=other), reader) != expected:
                return False
    return True
