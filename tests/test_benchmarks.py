"""The benchmarks' own arithmetic, and one real comparison of two small processes, one of which dies."""

import json
import math
import random
import sys

import pytest
from transformers import AutoTokenizer

from benchmarks import measure
from benchmarks.comparisons import Budget, Finding, Setting, loss_finding, memory_findings, speed_finding
from benchmarks.environments import python_of
from benchmarks.measure import Measured, Side, ratio, run_interleaved
from benchmarks.models import ModelSize, make_model_folder
from benchmarks.report import write_report
from benchmarks.texts import lognormal_lengths, long_tailed_lengths, make_text, xquad_like_lengths

MIB = 1 << 20


def _measured(
    name: str, seconds: list[float], *, peak: int = 2 * MIB, loss: float = 1.0, death: str = ""
) -> Measured:
    samples = [{"seconds": s, "cpu_seconds": s, "peak_rss_bytes": peak, "loss": loss} for s in seconds]
    return Measured(Side(name, "none", {}, "none"), idle_rss_bytes=MIB, samples=samples, death=death)


def test_ratio_pairs_neighbours_so_that_a_slow_spell_cancels():
    result = ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0])
    assert (result.median, result.lowest, result.highest) == (2.0, 2.0, 4.0)


def test_budgets_bound_from_below_and_from_above():
    assert Budget(">=", 2).met(2.0)
    assert not Budget(">=", 2).met(1.9)
    assert Budget("<=", 2).met(2.0)
    assert not Budget("<=", 2).met(2.1)
    assert not Budget(">=", 2).met(math.nan), "a side that died keeps no budget"


def test_findings_compare_time_memory_and_losses():
    slow, fast = (
        _measured("slow", [4.0, 8.0], peak=9 * MIB, loss=1.001),
        _measured("fast", [1.0, 2.0], peak=3 * MIB),
    )
    assert speed_finding("s", slow, fast, None)[0].value == 4.0
    assert [f.value for f in memory_findings("m", fast, slow, None)] == pytest.approx([3 / 9, 2 / 8])
    assert loss_finding("l", slow, fast)[0].value == pytest.approx(1e-3, rel=2e-3)
    dead = _measured("dead", [], death="exit code 1: out of memory")
    assert "dead died (exit code 1: out of memory)" in speed_finding("s", dead, fast, None)[0].what


def test_lengths_have_the_shapes_they_are_named_after():
    lengths = lognormal_lengths(101, 100, 0.5, 10, 1000)
    assert sorted(lengths)[50] == 100
    assert max(long_tailed_lengths(6)) == 8192
    assert sorted(long_tailed_lengths(6))[2] < 500
    queries, passages = xquad_like_lengths(64, 64)
    assert max(queries) <= 60 < sorted(passages)[32] < max(passages) <= 800


def test_every_text_has_the_length_it_was_made_for(tmp_path):
    folder = make_model_folder(tmp_path, ModelSize(500, 1, 64, 128))
    assert make_model_folder(tmp_path, ModelSize(500, 1, 64, 128)) == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 500
    ids = tokenizer([make_text(random.Random(0), length, 500) for length in (2, 3, 100)])["input_ids"]
    assert [len(x) for x in ids] == [2, 3, 100]
    assert (ids[2][0], ids[2][-1]) == (0, 2)
    assert 3 not in ids[2], "no word may be unknown"


def test_sides_run_in_turn_and_a_dead_one_is_reported_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    sizes = {
        "num_queries": 2,
        "query_rows": 3,
        "num_passages": 4,
        "passage_rows": 5,
        "width": 8,
        "threads": 1,
    }
    sides = [
        Side(name, "maxsim", {**sizes, "work": work}, sys.executable)
        for name, work in (("good", "maxsim"), ("bad", "nothing"))
    ]
    lines: list[str] = []
    good, bad = run_interleaved("trial", sides, repeats=2, say=lines.append)
    assert len(good.samples) == 2
    assert good.peak_rss_bytes >= good.idle_rss_bytes > 10 * MIB
    assert bad.death == "exit code 1: KeyError: 'nothing'"
    setting = Setting("tiny", 0, [good, bad], speed_finding("trial", bad, good, Budget(">=", 2)))
    page = write_report(tmp_path, {"trial": [setting]}, "this machine")
    assert "| trial: bad died (exit code 1: KeyError: 'nothing') | – | ≥ 2 | NO |" in page
    raw = json.loads((tmp_path / "results.json").read_text())
    assert raw["comparisons"]["trial"][0]["findings"][0]["value"] is None


def test_report_says_which_budgets_are_kept(tmp_path):
    setting = Setting(
        "s",
        100,
        [_measured("side", [1.0, 2.0, 3.0])],
        [Finding("fast enough", 3.0, "3.00×", Budget(">=", 2))],
    )
    page = write_report(tmp_path, {"name": [setting]}, "this machine")
    assert "| fast enough | 3.00× | ≥ 2 | yes |" in page
    assert "| side | 2.000 (1.000–3.000) | 50 | 2 | 1 | 1.000000 |" in page


def test_an_interpreter_of_your_own_replaces_the_environment(monkeypatch):
    monkeypatch.setenv("MEGAM3_BENCH_PYTHON_SENTENCE_TRANSFORMERS", sys.executable)
    assert python_of("sentence-transformers") == sys.executable
