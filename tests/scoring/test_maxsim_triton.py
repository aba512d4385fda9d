import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megam3.scoring import maxsim, winners
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


SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
"""Shared memory that one program may hold, by compute capability (CUDA C++ Programming Guide, table of
technical specifications)."""


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 128), ("bf16", 1024), ("fp16", 1024)])
@pytest.mark.parametrize(("capability", "tensor_cores"), [(80, "mma.sync"), (86, "mma.sync"), (90, "wgmma")])
def test_the_kernel_compiles_for_devices_that_are_not_here(
    dtype, width, capability, tensor_cores, tmp_path, monkeypatch
):
    """The tile of each (device, width) fits, and multiplies on the tensor cores."""
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
    tile = kernel.tile_for(divmod(capability, 10), width)
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
    assert compiled.metadata.shared <= SHARED_BYTES[capability]


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
    assert compiled.metadata.shared <= SHARED_BYTES[capability]


class Recorder:
    """Stands in for a Triton kernel: notes by what its compiler would tell a launch from earlier ones."""

    def __init__(self, triton, kernel, capability: int):
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        backend = triton.compiler.make_backend(target)
        self._bind = triton.runtime.jit.create_function_from_signature(
            kernel.signature, kernel.params, backend
        )
        self.launches, self.keys = 0, set()

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            _, specialization, options = self._bind(*arguments, **options)
            self.launches += 1
            self.keys.add((tuple(specialization), str(options)))

        return launch


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [128, 1024])
def test_no_shape_of_a_batch_makes_another_kernel(capability, width, monkeypatch):
    """Numbers of rows, texts and chunks that are 1, divide by 16 or do neither; offsets that begin in a
    middle."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    kernel = pytest.importorskip("megam3.scoring.maxsim_triton")
    forward, backward = (Recorder(triton, k, capability) for k in (kernel._best_rows, kernel._sum_rows))
    monkeypatch.setattr(kernel, "_best_rows", forward)
    monkeypatch.setattr(kernel, "_sum_rows", backward)
    monkeypatch.setattr(kernel, "INTERPRETED", kernel.tile_for(divmod(capability, 10), width))
    monkeypatch.setattr(winners, "best_rows", kernel.best_rows)
    monkeypatch.setattr(maxsim, "sum_rows", kernel.sum_rows)
    launched = []
    for queries in ([1], [16], [5, 12], [7, 9, 16]):
        for passages in ([1], [16, 16], [3] * 16, [2, 5, 1], [1, 40, 8, 3, 9]):
            for chunk in (None, 2 * sum(queries)):
                offsets = make_offsets(queries), make_offsets(passages)
                rows = [
                    torch.zeros(int(o[-1]), width, dtype=torch.bfloat16, requires_grad=True) for o in offsets
                ]
                scores = maxsim_scores(
                    rows[0], offsets[0], rows[1], offsets[1], chunk_elements=chunk, use_kernel=True
                )
                torch.autograd.grad(scores.sum(), rows)
                launched.append((forward.launches, backward.launches))
    assert launched[-1][0] > len(launched), "some batches go in several chunks"
    assert launched[-1][1] >= 2 * len(launched)
    assert len(forward.keys) == 1, forward.keys
    assert len(backward.keys) == 1, backward.keys


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
