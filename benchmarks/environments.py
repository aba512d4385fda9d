"""An environment of its own for each peer, made on first use under benchmarks/.venv-NAME.

MEGAM3_BENCH_PYTHON_NAME (upper case, `-` as `_`) names an interpreter to use instead; PIP_FLAGS holds options
for pip, as in the Makefile.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch"
"""Stands for the torch that megam3 itself is tested with, so that no side has faster kernels."""
ENVIRONMENTS = {
    "flagembedding": (TORCH, "FlagEmbedding==1.4.2", "transformers==4.57.6", "sentencepiece"),
    "sentence-transformers": (TORCH, "sentence-transformers==6.2.0", "transformers>=5,<6"),
}
"""Requirements. FlagEmbedding 1.4.2 runs with transformers 4 only."""


def python_of(name: str) -> str:
    """The interpreter of environment `name`, which is made, or made anew, unless a complete one is there.

    Raises:
        RuntimeError: pip could not install it; the message ends in pip's own.
    """
    chosen = os.environ.get("MEGAM3_BENCH_PYTHON_" + name.upper().replace("-", "_"))
    if chosen:
        return chosen
    folder = HERE / f".venv-{name}"
    wanted = "\n".join(_torch_pin() if item == TORCH else item for item in ENVIRONMENTS[name])
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    print(f"installing {name} into {folder.name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        *os.environ.get("PIP_FLAGS", "").split(),
        *wanted.split("\n"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} cannot be installed: {done.stderr.strip()[-400:]}")
    stamp.write_text(wanted)
    return str(python)


def _torch_pin() -> str:
    lines = (HERE.parent / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))
