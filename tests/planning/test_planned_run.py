"""A run that starts without a store, one that finds it, and what both say of the lengths they counted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megam3.cli import main
from megam3.config.load import load_config
from megam3.data.lengths import LongestTexts, longest_texts
from megam3.data.store import open_dataset
from megam3.planning.recipe import stored_lengths
from megam3.report.record import read_run
from tests.launches import make_workplace, train_calls
from tests.ranks import run_ranks

LINE = (
    r"peak memory after 3 steps: (-?[\d.]+) GiB \(the process, without the ([\d.]+) GiB before its model\);"
    r" planned ([\d.]+) GiB for them, ([\d.]+) GiB at most"
)


@pytest.mark.ranks
def test_a_run_plans_with_the_texts_of_its_store_and_compares_like_with_like(tmp_path: Path, capsys):
    place = make_workplace(tmp_path)
    settings = ["engine.template=auto", "train.steps=4", "data.passage_max_tokens=512"]
    names = ("new", "old")
    calls = [{"name": name, "arguments": [place.recipe, f"name={name}", *settings]} for name in names]
    results = run_ranks(train_calls, 1, calls)[0]
    assert [results[name]["code"] for name in names] == [0, 0], results
    config = load_config(place.recipe, ["name=new", *settings])
    longest = stored_lengths(config)
    assert longest is not None
    assert longest.text_tokens < 200
    words = (
        f"Planned for texts of at most {longest.text_tokens} tokens, the longest in the store (limit 512)."
    )
    logs = {name: (place.run(name) / "log.txt").read_text() for name in names}
    for name, log in logs.items():
        assert words in log
        found = re.search(LINE, log)
        assert found is not None, log
        measured, before, planned, most = map(float, found.groups())
        assert before > 0.1
        assert measured < before + 1
        assert planned <= most
        memory = read_run(place.run(name)).memory
        assert memory is not None
        assert (memory.measured, memory.planned, memory.planned_most) == (measured, planned, most)
    record = json.loads((place.run("old") / "engine_choice.json").read_text())
    assert record["fields"]["template"] == "zero0"

    assert main(["plan-memory", place.recipe, "name=new", "data.passage_max_tokens=512"]) == 0
    printed = capsys.readouterr().out
    assert words in printed
    assert f"texts up to {longest.text_tokens} tokens" in printed


def test_lengths_are_those_of_the_rows(tmp_path: Path):
    place = make_workplace(tmp_path)
    assert main(["prepare", place.recipe]) == 0
    config = load_config(place.recipe)
    name = config.data.train[0].name
    stored = open_dataset(config.store_dir, name)
    found = longest_texts(config.store_dir, [name])
    queries, texts = stored.index["query_tokens"], stored.runs["longest"]
    assert found == LongestTexts(query_tokens=int(np.max(queries)), text_tokens=int(np.max(texts)))
    assert found.text_tokens >= found.query_tokens
    # a dataset that is not there yet, and a file that is cut: whoever opens the store says so
    assert longest_texts(config.store_dir, [name, "another"]) is None
    (stored.folder / "runs.npy").write_bytes(b"cut")
    assert longest_texts(config.store_dir, [name]) is None
