"""Log lines: what the main rank says goes to `log.txt` and to stderr; other ranks only warn, and say which
rank they are."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TextIO

from megam3.errors import REFUSALS

ROOT_LOGGER = "megam3"
"""Every module logs under this name (`logging.getLogger(__name__)`)."""


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now: a live progress bar swaps it, and lines must then appear above
    the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _RunLog(logging.FileHandler):
    """log.txt. A full disk costs the lines and one word about them: what else the run writes there decides
    whether it ends, and logging's own answer is a traceback a line."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8")
        self._is_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or error.errno not in REFUSALS:
            super().handleError(record)
        elif not self._is_told:
            self._is_told = True
            message = (
                f"megam3: {self.baseFilename} cannot be written ({error.strerror}): lines are missing there"
            )
            print(message, file=sys.stderr)

    def close(self) -> None:
        # what could not be written is told already
        with contextlib.suppress(OSError):
            super().close()


def _not_file_only(record: logging.LogRecord) -> bool:
    return not getattr(record, "file_only", False)


def setup_logging(run_dir: str | Path | None, is_main: bool, rank: int = 0) -> None:
    """Route the package's log: INFO to `run_dir/log.txt` (appended) and stderr on the main rank, warnings to
    stderr elsewhere.

    `run_dir` None writes no file. A record logged with `extra={"file_only": True}` stays out of stderr. A
    second call replaces the routes.
    """
    logger = logging.getLogger(ROOT_LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    prefix = "" if is_main else f"[rank {rank}] "
    stderr_handler = _CurrentStderr()
    stderr_handler.addFilter(_not_file_only)
    stderr_handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.addHandler(stderr_handler)
    if is_main and run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file_handler = _RunLog(Path(run_dir) / "log.txt")
        file_handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        )
        logger.addHandler(file_handler)
