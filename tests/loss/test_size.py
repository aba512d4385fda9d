"""What `python -m benchmarks tiled_loss scaling` rests on: its fit, and that the sides measure the same
loss."""

import pytest

from benchmarks.loss_size import slope
from benchmarks.sides.loss import build
from benchmarks.worker import current_rss_bytes, peak_rss_bytes

SIZE = {"num_queries": 6, "num_passages": 12, "query_rows": 3, "passage_rows": 40, "width": 8}


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_slope_is_the_power_of_growth(power):
    sizes = (1, 2, 4, 16)
    assert slope(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"distill": True}, {"heads": "dense"}])
def test_the_sides_of_tiled_loss_compute_the_same(options):
    tiled, whole = build({**SIZE, **options, "tiles": True})(), build({**SIZE, **options})()
    assert tiled["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert tiled["gradient_norms"] == pytest.approx(whole["gradient_norms"], rel=1e-4)
    wanted = (
        {"query dense", "passage dense"}
        if options.get("heads")
        else {f"{s} {h}" for s in ("query", "passage") for h in ("dense", "lexical", "multi-vector")}
    )
    assert set(whole["gradient_norms"]) == wanted


def test_a_process_has_held_what_it_holds():
    held = current_rss_bytes()  # first: what is held may grow between the two questions
    assert peak_rss_bytes() >= held > 1 << 20
