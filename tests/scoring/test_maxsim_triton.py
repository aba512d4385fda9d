import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megam3.scoring.maxsim import maxsim_scores
from megam3.scoring.winners import prefers_kernel
from tests.representations import make_offsets

ROOT = Path(__file__).resolve().parents[2]


def test_rows_on_a_cpu_take_the_torch_path():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.zeros(2, 4, dtype=dtype)
        assert not prefers_kernel(rows, rows)


def test_the_kernel_under_the_interpreter(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/scoring/interpreted_kernel.py",
    ]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("capability", "tensor_cores", "shared_bytes"),
    [(80, "mma.sync", 163 << 10), (86, "mma.sync", 99 << 10), (90, "wgmma", 227 << 10)],
)
def test_the_kernel_compiles_for_devices_that_are_not_here(
    dtype, capability, tensor_cores, shared_bytes, tmp_path, monkeypatch
):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    kernel = pytest.importorskip("megam3.scoring.maxsim_triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        "query_KC": f"*{dtype}",
        "passage_KC": f"*{dtype}",
        "offsets_P1": "*i64",
        "best_KP": "*fp32",
        "winner_KP": "*i32",
    }
    types |= dict.fromkeys(("num_query_rows", "width", "num_passages"), "i32")
    tile = kernel.tile_for(divmod(capability, 10))
    constants = {"KEEP": True, "ROWS": tile.rows, "BLOCK": tile.block, "WIDTH": tile.width}
    aligned = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        kernel._best_rows,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(0,): aligned, (1,): aligned, (6,): aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(
        source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages}
    )
    assert tensor_cores in compiled.asm["ptx"]
    assert compiled.metadata.shared <= shared_bytes


@pytest.mark.parametrize("capability", [80, 90])
def test_the_sums_of_the_backward_pass_compile_for_bf16(capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    kernel = pytest.importorskip("megam3.scoring.maxsim_triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"crow_R1": "*i32", "columns_E": "*i32", "values_E": "*fp32"}
    types |= {"dense_XC": "*bf16", "result_RC": "*bf16", "width": "i32"}
    constants = {"ENTRIES": kernel.ENTRIES, "COLUMNS": kernel.COLUMNS}
    source = triton.compiler.ASTSource(
        kernel._sum_rows, types | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    assert "atom" not in compiled.asm["ptx"], "sums have one order"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 1000, 1024])
def test_the_kernel_on_a_device(dtype, width):
    pytest.importorskip("triton", reason="triton is not installed")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    generator = torch.Generator().manual_seed(0)
    query_offsets, passage_offsets = (
        make_offsets([5, 64, 1, 200, 33]),
        make_offsets([1, 130, 8192, 128, 700, 3]),
    )
    rows = [torch.randn(int(o[-1]), width, generator=generator) for o in (query_offsets, passage_offsets)]
    rows = [torch.nn.functional.normalize(x, dim=1).to(dtype) for x in rows]
    here = [x.double().requires_grad_() for x in rows]
    there = [x.cuda().requires_grad_() for x in rows]
    assert prefers_kernel(*there)
    sides = there[0], query_offsets.cuda(), there[1], passage_offsets.cuda()
    kernel, plain = maxsim_scores(*sides), maxsim_scores(*sides, use_kernel=False)
    reference = maxsim_scores(here[0], query_offsets, here[1], passage_offsets)
    torch.testing.assert_close(kernel, plain)
    torch.testing.assert_close(kernel.cpu(), reference.float())
    upstream = torch.randn(kernel.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(kernel, there, upstream.cuda()),
        torch.autograd.grad(reference, here, upstream.double()),
    ):
        torch.testing.assert_close(ours.cpu(), theirs.to(dtype))
