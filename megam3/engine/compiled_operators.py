"""DeepSpeed's operators that g++ compiles at the first start of a machine: loaded before any weight is read,
with messages where DeepSpeed and torch have none."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import get_default_build_root

from megam3.errors import ConfigError

logger = logging.getLogger(__name__)


def load_operator(
    name: str, load: Callable[[], Any], *, what: str, field: str, value: str, remedy: str
) -> None:
    """Build and load an operator.

    Args:
        name: its folder among torch's extensions.
        load: of DeepSpeed's builder.
        what: the operator in words, for the messages.
        field, value, remedy: of the recipe that asks for it.

    Raises:
        ConfigError: it cannot be built here.
    """
    for lock in _locks(name):
        logger.warning(
            "waiting for %s: another process compiles %s, or was killed while it did; delete the file if none"
            " does",
            lock,
            what,
        )
    try:
        load()
    # no compiler, no ninja, no header, a folder that cannot be written: each fails in its own way
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(field, value, f"{what} cannot be built here ({reason})", remedy) from error


def _locks(name: str) -> list[Path]:
    """Files that whoever compiles the operator holds; torch waits for them for ever and says nothing."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    # torch's own folder has one a Python and CUDA in between
    return [*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")]
