"""A run that draws two positives a query, stopped by a signal in the middle of an epoch and continued: the
same bits as without the stop."""

import json
from pathlib import Path

import pytest
import torch

from megam3.checkpoint import consolidated_weights
from tests.launches import Workplace, make_workplace, train_calls, write_jsonl
from tests.ranks import run_ranks

OPTIONS = ["data.positives_per_query=2", "engine.template=zero2", "train.steps=7"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Records with one, two and three positives."""
    place = make_workplace(tmp_path_factory.mktemp("positives"))
    records = [json.loads(line) for line in (place.folder / "pairs.jsonl").read_text().splitlines()]
    for row, record in enumerate(records):
        words = record["pos"][0].split()
        record["pos"] = [" ".join(words[k:] + words[:k]) for k in range(1 + row % 3)]
    write_jsonl(place.folder / "pairs.jsonl", records)
    return place


@pytest.mark.ranks
def test_a_stopped_run_continues_to_the_same_bits(place: Workplace) -> None:
    def call(name: str, run: str, *options: str, **more: object) -> dict:
        return {"name": name, "arguments": [place.recipe, f"name={run}", *OPTIONS, *options], **more}

    calls = [
        call("whole", "whole"),
        call("stopped", "stopped", signal=(1, 3, "SIGTERM")),
        call("continued", "stopped"),
        call("one", "one", "data.positives_per_query=1", "train.steps=1"),
    ]
    pair = run_ranks(train_calls, 2, calls)
    said = {name: result["said"] for name, result in pair[0].items()}
    codes = {name: [rank[name]["code"] for rank in pair] for name in said}
    assert codes == {"whole": [0, 0], "stopped": [143, 143], "continued": [0, 0], "one": [0, 0]}, said
    assert "newest checkpoint: step 4" in said["stopped"]
    assert place.figures("stopped") == place.figures("whole")
    assert [row["step"] for row in place.rows("stopped")] == list(range(1, 8))
    first, alone = (place.rows(name)[0]["loss/total"] for name in ("whole", "one"))
    assert first != alone, "the second positive is a column of its own"
    ends = [weights_of(place.run(name)) for name in ("stopped", "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return consolidated_weights(str(run / "checkpoints" / "step-000007"))
