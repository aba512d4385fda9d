"""DeepSpeed's operators, compiled for tests: each once a test run, in a folder that goes with it."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")),
    reason="DeepSpeed compiles its operators with g++ and ninja",
)

BUILD = """
import sys
from deepspeed.ops import op_builder
builder = getattr(op_builder, sys.argv[1])()
if not builder.is_compatible():
    sys.exit(77)
builder.load(verbose=False)
"""
NOT_COMPATIBLE = 77


@functools.cache
def compile_operator(builder: str, accelerator: str = "cpu") -> str | None:
    """A folder for TORCH_EXTENSIONS_DIR with the operator of this builder in it; None where DeepSpeed says
    that something is missing.

    Not the user's own folder: a build that a time limit ends leaves a lock behind, and whoever comes later to
    the same folder waits for it.
    """
    folder = tempfile.mkdtemp(prefix="megam3-extensions-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    environ = {**os.environ, "TORCH_EXTENSIONS_DIR": folder, "DS_ACCELERATOR": accelerator}
    built = subprocess.run(
        [sys.executable, "-c", BUILD, builder],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    if built.returncode == NOT_COMPATIBLE:
        return None
    assert built.returncode == 0, built.stderr[-2000:]
    return folder


def compile_adamw(accelerator: str = "cpu") -> str:
    """DeepSpeed's AdamW for states in host memory."""
    folder = compile_operator("CPUAdamBuilder", accelerator)
    assert folder is not None
    return folder
