"""Files appear whole or not at all."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megam3.files import atomic_file, atomic_folder, file_digest, flush_tree, read_json, write_json


def test_a_file_appears_with_its_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path) as stream:
        stream.write(b"half")
        assert not path.exists()
        stream.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_file(path, "w") as stream:
            stream.write("new")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file_at_once_leave_one_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    both_write = threading.Barrier(2, timeout=60)
    failures: list[Exception] = []

    def write(letter: str) -> None:
        try:
            with atomic_file(path, "w") as stream:
                stream.write(letter * 5)
                both_write.wait()
                stream.write(letter * 5)
                both_write.wait()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert path.read_text() in ("a" * 10, "b" * 10)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with atomic_folder(final) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a").write_text("x")
        flush_tree(aside)
        assert not final.exists()
    assert (final / "sub" / "a").read_text() == "x"
    assert list(tmp_path.iterdir()) == [final]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def fill_half() -> None:
        with atomic_folder(tmp_path / "out") as aside:
            (aside / "a").write_text("x")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fill_half()
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("x")
    with atomic_folder(tmp_path / "out") as aside:
        (aside / "new").write_text("y")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_json_keeps_order_and_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": 1, "a": "größe"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "größe" in text
    assert list(json.loads(text)) == ["z", "a"]
    assert read_json(tmp_path / "a.json") == {"z": 1, "a": "größe"}


def test_digest_is_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_a_folder_can_be_read_by_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out") as aside:
            save_file({"a": torch.zeros(1)}, aside / "weights.safetensors")
            (aside / "run.sh").touch(0o755)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "weights.safetensors").stat().st_mode & 0o777 == mode
    assert (tmp_path / "out" / "run.sh").stat().st_mode & 0o100
