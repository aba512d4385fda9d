"""In which order a checkpoint reaches the disk, which ones stay, and what a user reads when it cannot be
written."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megam3.batch import Progress
from megam3.checkpoint import clear_partials, find_problem, newest_complete, read_state
from megam3.checkpoint.save import describe_size
from megam3.dist import comm
from megam3.errors import CheckpointError
from tests.checkpoint.writing import save_step, write_rank_file
from tests.ranks import run_ranks


def steps_in(run_dir: Path) -> list[str]:
    return sorted(name for name in os.listdir(run_dir / "checkpoints") if name.startswith("step"))


class Recorder:
    """Every flush, rename and removal in the order of the calls, with the path each one was about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple[str, str]] = []
        fsync, rename, replace, rmtree = os.fsync, os.rename, os.replace, shutil.rmtree

        def flush(descriptor: int) -> None:
            self.calls.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def moving(name: str, function):
            def move(source, target):
                self.calls.append((name, str(target)))
                function(source, target)

            return move

        def remove(path, *args, **kwargs):
            self.calls.append(("remove", str(path)))
            rmtree(path, *args, **kwargs)

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "rename", moving("rename", rename))
        monkeypatch.setattr(os, "replace", moving("replace", replace))
        monkeypatch.setattr(shutil, "rmtree", remove)

    def position(self, kind: str, end: str) -> int:
        """Of the first call of this kind whose path ends so."""
        found = [n for n, (name, path) in enumerate(self.calls) if name == kind and path.endswith(end)]
        assert found, f"no {kind} of {end} in {self.calls}"
        return found[0]


def test_everything_is_on_the_disk_before_the_name_and_the_name_before_the_removal(tmp_path, monkeypatch):
    save_step(tmp_path, 1, keep=1)
    seen = Recorder(monkeypatch)
    save_step(tmp_path, 2, keep=1)
    partial = ".step-000002.partial"
    files = [
        seen.position("flush", f"{partial}/{file}") for file in ("engine/weights.bin", "model/config.json")
    ]
    folders = [seen.position("flush", f"{partial}/{folder}") for folder in ("engine", "model")]
    state = seen.position("replace", f"{partial}/state.json")
    manifest, marker = (
        seen.position("replace", f"{partial}/{file}") for file in ("manifest.json", "COMPLETE")
    )
    name = seen.position("rename", "checkpoints/step-000002")
    parents = [n for n, call in enumerate(seen.calls) if call == ("flush", f"{tmp_path}/checkpoints")]
    removal = seen.position("remove", "step-000001.partial")
    assert max(*files, *folders, state) < manifest < marker < name < removal
    assert any(marker < n < name for n, call in enumerate(seen.calls) if call[1].endswith(partial))
    assert any(name < n < removal for n in parents)
    # a file that is renamed into place was flushed under its temporary name
    for target in (state, manifest, marker):
        assert seen.calls[target - 1][0] == "flush"


def test_damaged_ones_count_for_nothing_and_the_only_whole_one_stays(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    for step in (2, 3):
        Path(tmp_path, f"checkpoints/step-00000{step}/engine/weights.bin").write_bytes(b"")
    save_step(tmp_path, 4, keep=2)
    assert steps_in(tmp_path) == [
        "step-000001",
        "step-000002.damaged-1",
        "step-000003.damaged-1",
        "step-000004",
    ]


def test_the_one_just_written_and_the_one_resumed_from_are_never_removed(tmp_path):
    for step in (1, 2, 900):
        save_step(tmp_path, step)
    save_step(tmp_path, 3, keep=1, resumed_step=2)
    assert steps_in(tmp_path) == ["step-000002", "step-000003", "step-000900"]


def test_every_so_many_steps_one_stays(tmp_path):
    for step in range(1, 8):
        save_step(tmp_path, step, keep=1, every_steps=3)
    assert steps_in(tmp_path) == ["step-000003", "step-000006", "step-000007"]


def test_a_save_does_not_look_through_all_that_are_kept(tmp_path, monkeypatch):
    for step in range(1, 8):
        save_step(tmp_path, step, keep=2, every_steps=1)
    looked_at: list[str] = []

    def find(folder, *args, **kwargs):
        looked_at.append(os.path.basename(folder))
        return find_problem(folder, *args, **kwargs)

    monkeypatch.setattr("megam3.checkpoint.folders.find_problem", find)
    save_step(tmp_path, 8, keep=2, every_steps=1)
    assert looked_at == ["step-000008", "step-000007"]
    assert len(steps_in(tmp_path)) == 8


def test_with_one_to_keep_the_older_one_goes_only_when_the_newer_was_read_back(tmp_path, monkeypatch):
    save_step(tmp_path, 1, keep=1)
    answers = iter(range(100))
    monkeypatch.setattr(
        "megam3.checkpoint.save.describe_file", lambda path: {"bytes": 512, "crc32": next(answers)}
    )
    with pytest.raises(CheckpointError, match=r"other bytes came back than were written"):
        save_step(tmp_path, 2, keep=1)
    assert steps_in(tmp_path) == ["step-000001"]
    monkeypatch.undo()
    save_step(tmp_path, 3, keep=1)
    assert steps_in(tmp_path) == ["step-000003"]


def test_a_step_that_is_there_already_is_set_aside_and_not_overwritten(tmp_path):
    os.remove(f"{save_step(tmp_path, 2)}/COMPLETE")
    assert find_problem(save_step(tmp_path, 2)) is None
    assert steps_in(tmp_path) == ["step-000002", "step-000002.damaged-1"]


def test_a_removal_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    save_step(tmp_path, 1)

    def dies(path, *args, **kwargs):
        os.remove(f"{path}/engine/weights.bin")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        save_step(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert newest_complete(str(tmp_path), pytest.fail).endswith("step-000002")
    save_step(tmp_path, 3)
    assert [name for name in os.listdir(tmp_path / "checkpoints") if name.endswith(".partial")] == []


def test_a_removed_one_that_somebody_still_reads_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    rmtree = shutil.rmtree

    def busy(path, *args, **kwargs):
        # on NFS a removed file stays as .nfs… while a process of this machine has it open
        if os.path.basename(path) == ".step-000001.partial":
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", busy)
    save_step(tmp_path, 1)
    save_step(tmp_path, 2, keep=1)
    save_step(tmp_path, 3, keep=1)
    clear_partials(str(tmp_path))
    assert steps_in(tmp_path) == ["step-000003"]
    assert "Device or resource busy" in caplog.text
    monkeypatch.undo()
    save_step(tmp_path, 4)
    assert not (tmp_path / "checkpoints" / ".step-000001.partial").exists()


def test_a_fence_that_refuses_leaves_the_name_unseen(tmp_path):
    save_step(tmp_path, 1)

    def refuses():
        raise CheckpointError("output_dir", "runs/x", "belongs to another run", "stop it")

    with pytest.raises(CheckpointError, match="belongs to another run"):
        save_step(tmp_path, 2, fence=refuses)
    assert steps_in(tmp_path) == ["step-000001"]


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    save_step(tmp_path, 1, write=lambda folder: write_rank_file(folder, 1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 0, 1 << 20))
    wrote = []
    message = r"the next checkpoint needs 1 MiB, and its disk has 1 MiB free.*lower train.keep_checkpoints"
    with pytest.raises(CheckpointError, match=message):
        save_step(tmp_path, 2, write=lambda folder: wrote.append(folder) or [])
    assert not wrote


def test_a_lower_number_to_keep_frees_the_space_of_the_next_one(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_step(tmp_path, step, write=lambda folder: write_rank_file(folder, 1 << 20))

    def usage(path):
        return shutil._ntuple_diskusage(1 << 30, 0, (5 - len(steps_in(tmp_path))) * (1 << 19))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(CheckpointError, match="lower train.keep_checkpoints"):
        save_step(tmp_path, 4)
    save_step(tmp_path, 4, keep=1, resumed_step=3)
    assert steps_in(tmp_path) == ["step-000003", "step-000004"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Four megabytes of tmpfs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_a_users_error_and_the_next_start_has_its_space_again(small_disk):
    save_step(small_disk, 1, write=lambda folder: write_rank_file(folder, 1 << 20))
    message = r"a checkpoint cannot be written: .*No space left on device.*the newest checkpoint is whole"
    with pytest.raises(CheckpointError, match=message):
        save_step(small_disk, 2, write=lambda folder: write_rank_file(folder, 1 << 22))
    assert newest_complete(str(small_disk), pytest.fail).endswith("step-000001")
    assert find_problem(save_step(small_disk, 3, keep=1, write=write_rank_file)) is None


def test_a_disk_that_takes_not_even_the_models_small_files_is_full(small_disk):
    (small_disk / "model").mkdir()
    (small_disk / "model" / "tokenizer.json").write_bytes(bytes(3 << 20))
    with pytest.raises(CheckpointError, match=r"No space left on device.*free space"):
        save_step(small_disk, 1)


def test_torch_says_a_full_disk_in_its_own_way(small_disk):
    import torch

    def write(folder):
        torch.save({"w": torch.zeros(2_000_000)}, f"{folder}/w.pt")
        return ["w.pt"]

    with pytest.raises(CheckpointError, match=r"a checkpoint cannot be written.*free"):
        save_step(small_disk, 1, write=write)


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    def write(folder):
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        save_step(tmp_path, 1, write=write)


def test_a_file_that_appears_late_is_waited_for_and_one_that_never_does_has_no_size(tmp_path):
    assert describe_size(str(tmp_path / "never"), patience_seconds=0.0) == -1
    (tmp_path / "late").write_bytes(b"x")
    assert describe_size(str(tmp_path / "late"), patience_seconds=0.0) == 1


def _save_on_two_ranks(folder: str, how: str) -> list[str]:
    run_dir = Path(folder)
    if how == "stale listing":
        # the main rank's listing does not show what the other rank wrote
        import megam3.checkpoint.save as save

        real = save.files_below
        save.files_below = lambda path: [f for f in real(path) if "rank-1" not in f]
    if how == "apart":
        run_dir = run_dir / f"node-{comm.rank()}"
        import megam3.checkpoint.save as save

        save.STALE_SECONDS = 0.5
    if how == "disk" and comm.is_main():
        real_usage = shutil.disk_usage
        shutil.disk_usage = lambda path: real_usage(path)._replace(free=0)
    try:
        return sorted(find_listed(save_step(run_dir, 5)))
    except CheckpointError as error:
        return [str(error)]
    except Exception as error:
        return [type(error).__name__, str(error)]


def find_listed(folder: str) -> list[str]:
    import json

    assert find_problem(folder) is None
    assert read_state(folder).progress == Progress(step=5)
    return list(json.loads(Path(folder, "manifest.json").read_text()))


@pytest.mark.ranks
def test_two_ranks_list_all_files_even_where_a_listing_is_old(tmp_path):
    expected = ["engine/rank-0.bin", "engine/rank-1.bin", "model/config.json", "state.json"]
    assert run_ranks(_save_on_two_ranks, 2, str(tmp_path / "a"), "plain") == [expected, expected]
    assert run_ranks(_save_on_two_ranks, 2, str(tmp_path / "b"), "stale listing") == [expected, expected]


@pytest.mark.ranks
def test_an_error_of_the_main_rank_is_every_ranks_error(tmp_path):
    (tmp_path / "checkpoints").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001").mkdir()
    (tmp_path / "checkpoints" / "step-000001" / "f").write_bytes(b"x")
    said = run_ranks(_save_on_two_ranks, 2, str(tmp_path), "disk")
    assert said[0] == said[1]
    assert "its disk has 0 MiB free" in said[0][0]


@pytest.mark.ranks
def test_a_run_folder_that_nodes_do_not_share_is_refused_with_the_ranks_named(tmp_path):
    said = run_ranks(_save_on_two_ranks, 2, str(tmp_path), "apart")
    assert "do not see what rank 0" in said[0][1]
    assert "give a folder on a file system that all nodes share" in said[0][1]
    assert "do not see what rank 0" in said[1][1]


def test_errno_of_a_quota_is_that_of_a_full_disk(tmp_path):
    def write(folder):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(CheckpointError, match=r"Disk quota exceeded.*free space"):
        save_step(tmp_path, 1, write=write)
