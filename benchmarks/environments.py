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
TRITON = "triton==3.7.1"
"""What torch 2.13.0 for CUDA requires. Its build for CPUs requires none; with the newest, 3.9.0, NeMo
AutoModel's kernels cannot be imported."""
ENVIRONMENTS = {
    "flagembedding": (TORCH, "FlagEmbedding==1.4.2", "transformers==4.57.6", "sentencepiece"),
    "sentence-transformers": (TORCH, "sentence-transformers==6.2.0", "transformers>=5,<6"),
    "pylate": (
        TORCH,
        TRITON,
        "late-interaction-kernels==0.4.5",
        "sentence-transformers==5.3.0",
        "transformers==5.3.0",
        "accelerate",
        "datasets",
        "pandas",
        "ujson==5.12.0",
        "fastkmeans==0.5.0",
    ),
    "nemo-automodel": (TORCH, TRITON, "nemo-automodel==0.7.0"),
    "late-interaction-kernels": (TORCH, TRITON, "late-interaction-kernels==0.4.5"),
    "flash-maxsim": (TORCH, TRITON, "flash-maxsim==0.3.0"),
}
"""Requirements. FlagEmbedding 1.4.2 runs with transformers 4 only."""
ALONE = {"pylate": "pylate==1.6.0"}
"""Installed without what it requires: its index, fast-plaid, wants an older torch, and no step needs it."""


def variable_of(name: str) -> str:
    """The variable that names an interpreter for environment `name`.

    >>> variable_of("flash-maxsim")
    'MEGAM3_BENCH_PYTHON_FLASH_MAXSIM'
    """
    return "MEGAM3_BENCH_PYTHON_" + name.upper().replace("-", "_")


def find_python(name: str) -> str | None:
    """The interpreter of environment `name` where there is one already; nothing is installed."""
    chosen = os.environ.get(variable_of(name))
    if chosen:
        # whoever starts it does so elsewhere
        chosen = os.path.abspath(chosen) if os.sep in chosen else chosen
        return shutil.which(chosen)
    folder = HERE / f".venv-{name}"
    stamp = folder / "installed"
    is_complete = stamp.exists() and stamp.read_text() == _wanted(name)
    return str(folder / "bin" / "python") if is_complete else None


def python_of(name: str) -> str:
    """The interpreter of environment `name`, which is made, or made anew, unless a complete one is there.

    Raises:
        RuntimeError: pip could not install it (the message ends in pip's own), or the variable names nothing.
    """
    found = find_python(name)
    if found:
        return found
    if chosen := os.environ.get(variable_of(name)):
        raise RuntimeError(f"{variable_of(name)} = {chosen}: this is no interpreter")
    folder, wanted = HERE / f".venv-{name}", _wanted(name)
    python = folder / "bin" / "python"
    print(f"installing {name} into {folder.name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", *os.environ.get("PIP_FLAGS", "").split()]
    commands = [[*install, "--no-deps", ALONE[name]]] if name in ALONE else []
    commands.append([*install, *(line for line in wanted.split("\n") if line != ALONE.get(name))])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} cannot be installed: {done.stderr.strip()[-400:]}")
    (folder / "installed").write_text(wanted)
    return str(python)


def _wanted(name: str) -> str:
    pinned = [_torch_pin() if item == TORCH else item for item in ENVIRONMENTS[name]]
    return "\n".join([*pinned, *([ALONE[name]] if name in ALONE else [])])


def library_of(name: str) -> str:
    """The requirement that environment `name` is made for.

    >>> library_of("flash-maxsim"), library_of("pylate")
    ('flash-maxsim==0.3.0', 'pylate==1.6.0')
    """
    return ALONE.get(name) or next(item for item in ENVIRONMENTS[name] if item not in (TORCH, TRITON))


def _torch_pin() -> str:
    lines = (HERE.parent / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))
