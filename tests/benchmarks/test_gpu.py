"""The command that measures a GPU node, in its CPU form: start to table, interrupted and continued."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import environments
from benchmarks.gpu import peer, runner, step
from benchmarks.gpu.pieces import TINY as TINY_MODEL
from benchmarks.gpu.pieces import Piece, list_pieces
from benchmarks.gpu.table import write_table
from benchmarks.models import make_model_folder

TINY = ("--device", "cpu", "--tiny")
LINES, PAGE = "gpu-cpu-tiny-pieces.jsonl", "gpu-cpu-tiny.md"


def _run(folder, *options):
    runner.main([*TINY, "--results", str(folder), *options])
    return runner.read_done(folder / LINES, runner.find_machine(False))


@pytest.fixture(autouse=True)
def no_peers(monkeypatch, tmp_path):
    """Whatever is installed beside this checkout."""
    for name in environments.ENVIRONMENTS:
        monkeypatch.delenv(environments.variable_of(name), raising=False)
    monkeypatch.setattr(environments, "HERE", tmp_path / "none" / "benchmarks")
    monkeypatch.setattr(environments, "_torch_pin", lambda: "torch")


@pytest.mark.slow
def test_every_piece_runs_to_the_table(tmp_path):
    done = _run(tmp_path)
    pieces = list_pieces(1, True, False)
    assert set(done) == {piece.name for piece in pieces}
    for piece in pieces:
        entry = done[piece.name]
        assert ("failure" in entry) == bool(piece.environment), entry
        assert bool(entry.get("missing")) == bool(piece.environment)


def test_a_peer_that_is_not_there_has_a_row_and_is_asked_for_again(tmp_path, monkeypatch):
    name = "peer: pylate, cached, multi-vector, 16 tokens"
    done = _run(tmp_path, "--only", name)
    reason = (
        "missing: MEGAM3_BENCH_PYTHON_PYLATE names no interpreter that has pylate==1.6.0"
        " (benchmarks/environments.py)"
    )
    assert done[name]["failure"] == reason
    assert f"| {name} | {reason} |" in (tmp_path / PAGE).read_text()
    # a path that leads nowhere is no interpreter either
    monkeypatch.setenv("MEGAM3_BENCH_PYTHON_PYLATE", str(tmp_path / "python"))
    assert _run(tmp_path, "--only", name)[name]["failure"] == reason
    with pytest.raises(RuntimeError, match="MEGAM3_BENCH_PYTHON_PYLATE = .*python: this is no interpreter"):
        environments.python_of("pylate")
    # an interpreter without it: the row says what it lacks
    monkeypatch.setenv("MEGAM3_BENCH_PYTHON_PYLATE", sys.executable)
    done = _run(tmp_path, "--only", name)
    assert "No module named 'pylate'" in done[name]["failure"]
    calls = []
    monkeypatch.setattr(runner, "run_piece", lambda *arguments: calls.append(arguments))
    _run(tmp_path, "--only", name)
    assert calls == [], "a failure stays until --again"


def test_a_peers_step_is_timed_in_its_environment(tmp_path, monkeypatch):
    """The side that every environment of the tests has: megam3's own."""
    monkeypatch.setenv("MEGAM3_BENCH_PYTHON_FLASH_MAXSIM", sys.executable)
    folder = make_model_folder(tmp_path, TINY_MODEL)
    lengths = {"query_tokens": 4, "passage_tokens": 8, "num_queries": 2, "passages_per_query": 3}
    spec = {**lengths, "vocab_size": TINY_MODEL.vocab_size, "side": "megam3_step"}
    piece = Piece(name="peer: x", module="peer", spec=spec, environment="flash-maxsim")
    entry = runner.run_piece(piece, {"device": "cpu", "model_folder": str(folder)})
    figures = entry["figures"]
    assert figures["queries"] == 2
    assert figures["tokens_per_second"] == pytest.approx((2 * 4 + 6 * 8) / figures["seconds"])
    assert figures["peak_bytes"] > 0
    page = write_table(tmp_path / "gpu.md", [entry], "here").read_text()
    assert "Steps of other libraries" in page
    assert f"| {figures['loss']:.4g} |" in page


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_step_that_computes_nothing_is_no_measurement(name, value):
    assert peer.check_step({"loss": 1.0, "grad_norm": 2.0})["loss"] == 1.0
    with pytest.raises(RuntimeError, match=f"the first step has {name} = {value}"):
        peer.check_step({"loss": 1.0, "grad_norm": 2.0, name: value})


def test_scores_and_gradients_of_a_peer_are_those_of_maxsim():
    rows = [torch.randn(3, 5, 8, requires_grad=True), torch.randn(4, 7, 8, requires_grad=True)]

    def score(query, passage):
        return torch.einsum("qac,pbc->qpab", query, passage).amax(-1).sum(-1)

    peer.check_maxsim(score, rows)
    with pytest.raises(RuntimeError, match="scores differ from the plain product's by"):
        peer.check_maxsim(lambda q, p: score(q, p) / 5, rows)
    with pytest.raises(RuntimeError, match="passage gradients differ"):
        peer.check_maxsim(lambda q, p: score(q, p.detach() + 0 * p), rows)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    """One piece of each kind; the second call meets the line of the first, and a line that a kill cut."""
    first = _run(tmp_path, "--only", "gradient cache, 96", "--max-pieces", "1")
    assert list(first) == ["gradient cache, 96 tokens"]
    figures = first["gradient cache, 96 tokens"]["figures"]
    assert figures["tokens_per_second"] > 0
    assert figures["planned_bytes"] > 0
    lines = tmp_path / LINES
    before = lines.read_text()
    lines.write_text(before + '{"name": "MaxSim, C = 3')
    lines.write_text(lines.read_text() + "\n")
    both = _run(tmp_path, "--only", "MaxSim, C = 32", "--max-pieces", "1")
    assert list(both) == ["gradient cache, 96 tokens", "MaxSim, C = 32"]
    assert lines.read_text().startswith(before)
    page = (tmp_path / PAGE).read_text()
    assert page.count("| gradient cache, 96 tokens |") == 1
    assert "| MaxSim, C = 32 |" in page


def test_a_failed_piece_has_its_reason_and_runs_again_when_asked(tmp_path, monkeypatch):
    ends = {"MaxSim, C = 32": "out of memory", "MaxSim, C = 64": None}
    own = [piece for piece in list_pieces(1, True, False) if piece.name in ends]
    monkeypatch.setattr(runner, "list_pieces", lambda *node: own)
    calls = []

    def run_piece(piece, common):
        calls.append(piece.name)
        if ends[piece.name]:
            return {"name": piece.name, "failure": ends[piece.name]}
        figures = {"forward_seconds": 1.0, "backward_seconds": 1.0, "peak_share": 0.5}
        return {"name": piece.name, "figures": figures}

    monkeypatch.setattr(runner, "run_piece", run_piece)
    _run(tmp_path, "--only", "MaxSim")
    assert "| MaxSim, C = 32 | out of memory |" in (tmp_path / PAGE).read_text()
    _run(tmp_path, "--only", "MaxSim")
    ends["MaxSim, C = 32"] = None
    done = _run(tmp_path, "--only", "MaxSim", "--again")
    assert calls == ["MaxSim, C = 32", "MaxSim, C = 64", "MaxSim, C = 32"]
    assert "figures" in done["MaxSim, C = 32"]


def test_what_a_piece_says_at_its_end_is_its_reason(tmp_path, monkeypatch):
    piece = Piece(name="x", module="maxsim", spec={})
    # no such device: the child dies with a message of torch's
    entry = runner.run_piece(piece, {"device": "nowhere"})
    assert entry["failure"].startswith("exit code 1: ")
    script = tmp_path / "slow"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert runner.run_piece(piece, {}, seconds=0.2)["failure"] == "not done after 0.2 seconds"


def test_the_rank_that_failed_is_heard_and_nobody_waits_for_its_peers(tmp_path):
    def rank(code: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code])

    ranks = [rank("import time; time.sleep(60)"), rank("raise SystemExit(3)")]
    started = time.monotonic()
    assert runner._wait(ranks, 60.0) == (1, "exit code 3")
    assert time.monotonic() - started < 30
    assert all(process.poll() is not None for process in ranks)
    logs = [
        "Traceback …\n[rank1]: torch.distributed.DistNetworkError: gone\n[rank1]:[W1129] a warning",
        "a warning of rank 0",
    ]
    assert runner._reason("exit code 3", logs) == "exit code 3: torch.distributed.DistNetworkError: gone"
    assert runner._reason("exit code 3", ["", "last words\n"]) == "exit code 3: last words"
    assert runner._reason("exit code 1", ["CUDA error: out of memory", "x"]) == "out of memory"


def test_lines_of_another_machine_are_not_this_ones(tmp_path):
    lines = tmp_path / LINES
    lines.write_text(json.dumps({"name": "x", "machine": "H100, torch 2", "figures": {}}) + "\n")
    assert list(runner.read_done(lines, "H100, torch 2")) == ["x"]
    assert runner.read_done(lines, "A100, torch 2") == {}


def test_an_interpreter_may_be_named_from_here(tmp_path, monkeypatch):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGAM3_BENCH_PYTHON_PYLATE", "bin/python")
    # not resolved: the link is what makes it a virtual environment's
    assert environments.find_python("pylate") == str(python)


def test_a_step_runs_on_two_ranks(tmp_path):
    folder = make_model_folder(tmp_path, TINY_MODEL)
    spec = next(piece.spec for piece in list_pieces(1, True, False) if piece.name.startswith("ZeRO 2"))
    piece = Piece(name="ZeRO 2", module="step", spec=spec, num_gpus=2)
    figures = runner.run_piece(piece, {"device": "cpu", "model_folder": str(folder)})["figures"]
    tokens = spec["num_queries"] * (
        spec["query_tokens"] + spec["passages_per_query"] * spec["passage_tokens"]
    )
    assert figures["tokens_per_second"] == pytest.approx(2 * tokens / figures["seconds"])


def test_a_batch_grows_until_memory_ends_or_time_does(tmp_path, monkeypatch):
    spec = step.StepSpec(
        stage=1, query_tokens=8, passage_tokens=8, num_queries=1, passages_per_query=1, grow=True
    )
    engine = SimpleNamespace(device=torch.device("cuda"))
    held: list[int] = []
    monkeypatch.setattr(step, "forget_peak_memory", lambda device: held.clear())
    monkeypatch.setattr(step, "peak_memory_bytes", lambda device: max(held))

    def limit(most: int, error: RuntimeError) -> None:
        def measure(spec, engine, vocab_size):
            held.append(spec.num_queries)
            if spec.num_queries > most:
                raise error
            return 1.0

        monkeypatch.setattr(step, "measure", measure)

    for error in (torch.OutOfMemoryError("no"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")):
        limit(4, error)
        found = step.grow(spec, engine, 10)
        assert (found.spec.num_queries, found.peak_bytes, found.ended_by) == (4, 4, "memory")
    limit(4, RuntimeError("an error of another kind"))
    with pytest.raises(RuntimeError, match="another kind"):
        step.grow(spec, engine, 10)
    limit(0, torch.OutOfMemoryError("not even one"))
    with pytest.raises(torch.OutOfMemoryError):
        step.grow(spec, engine, 10)
    limit(10**6, RuntimeError())
    assert step.grow(spec, engine, 10).ended_by == "bound"
    monkeypatch.setattr(step, "GROW_SECONDS", 0.0)
    found = step.grow(spec, engine, 10)
    assert (found.spec.num_queries, found.ended_by) == (1, "time")
    entry = {"name": "largest batch", "figures": {"queries": 1, "ended_by": "time"}}
    assert "| largest batch | ≥ 1 |" in write_table(tmp_path / "page", [entry], "here").read_text()


def test_without_a_device_the_command_says_how_to_try_it(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        runner.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_the_pieces_of_a_node_cover_stages_counts_and_lengths():
    names = [piece.name for piece in list_pieces(8, tiny=False, has_device=True)]
    assert len(names) == len(set(names))
    for count in (1, 2, 4, 8):
        for stage in (1, 2, 3):
            assert f"ZeRO {stage}, {count} GPUs, 512 tokens" in names
    assert sum(name.startswith("largest batch") for name in names) == 12
    assert any("offload, 8192" in name for name in names)
    for library in ("FlagEmbedding", "sentence-transformers", "NeMo AutoModel", "pylate"):
        for tokens in (512, 8192):
            assert any(n.startswith(f"peer: {library}") and f"{tokens} tokens" in n for n in names)
    for package in ("flash-maxsim", "late-interaction-kernels"):
        assert f"MaxSim, C = 1024: {package}" in names
    assert all(json.dumps(piece.spec) for piece in list_pieces(8, False, True))
