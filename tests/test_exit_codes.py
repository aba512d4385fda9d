"""What a rank says and with which code it ends, for each end that is no fault of the code."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megam3 import train
from megam3.data.process import WorkerKilledError
from megam3.dist.comm import MeetingError
from megam3.errors import DataError
from megam3.obs.health import EXIT_STALLED

CONFIG: Any = SimpleNamespace(run_dir="/runs/one")
RANKS: Any = SimpleNamespace(rank=3, world_size=8)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("a.jsonl:3", 1, "is a number", "mend it"), 2, "rank 3: error: a.jsonl:3 = 1: is a number"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "file = '/runs/one': cannot be used (No spa",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "file = '/x': cannot be used (Read-only"),
        (
            WorkerKilledError("worker w (pid 7) was killed by SIGKILL", 9),
            137,
            "rank 3: worker w (pid 7) was k",
        ),
        (
            MeetingError("MASTER_ADDR", "a:1", "no", "look"),
            EXIT_STALLED,
            "rank 3: error: MASTER_ADDR = 'a:1'",
        ),
        (
            RuntimeError("Timed out waiting 9000ms for send"),
            EXIT_STALLED,
            "the other ranks did not answer: Ti",
        ),
        (
            RuntimeError("Connection reset by peer [::1]"),
            1,
            "rank 3: another rank has ended; its own message",
        ),
    ],
)
def test_an_end_that_is_nobodys_bug(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train._tell(error, CONFIG, RANKS) == code
    assert said in capsys.readouterr().err


def test_bugs_keep_their_traceback() -> None:
    for error in (ZeroDivisionError("at 5"), OSError(errno.ENOENT, "No such file"), RuntimeError("shapes")):
        assert train._tell(error, CONFIG, RANKS) is None


@pytest.mark.parametrize(
    ("error", "code", "noted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "1\n"),
        (ZeroDivisionError("at 5"), 1, "1\n"),
        (DataError("a.jsonl:3", 1, "is a number", "mend it"), 2, "2\n"),
        # what another rank's end may look like from here, and what another start may mend
        (RuntimeError("NCCL communicator was aborted"), 1, None),
        (MeetingError("MASTER_ADDR", "a:1", "no", "look"), EXIT_STALLED, None),
        (WorkerKilledError("worker w (pid 7) was killed by SIGKILL", 9), 137, None),
    ],
)
def test_an_error_that_would_come_again_is_left_for_the_script_that_starts_the_ranks(
    error: Exception, code: int, noted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fault"
    monkeypatch.setenv(train.FAULT_FILE_VARIABLE, str(file))
    train._note_fault(error, code)
    assert (file.read_text() if file.exists() else None) == noted
