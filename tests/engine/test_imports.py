"""What an engine need not import."""

import os
import subprocess
import sys

CODE = """
import sys
import torch
from megam3.engine.deepspeed import join
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer

# not DeepSpeed's own way in, which would compile an operator first
join(torch.device("cpu"))
# what deepspeed.initialize asks in every start
assert is_zero_supported_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
loaded = [name for name in sys.modules if name.startswith("torch._inductor.")]
assert "torch._inductor.compile_fx" not in loaded, loaded
from deepspeed.runtime import compiler
assert compiler.compile.__module__ == "deepspeed.runtime.compiler"
"""


def test_the_compiler_is_not_loaded_for_an_optimizer_that_nobody_uses() -> None:
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
