"""`python -m megam3.train` in one process: what a user who made a mistake reads, and what a run says about
itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megam3.checkpoint import consolidated_weights
from megam3.config.load import load_config
from megam3.obs.stop import EXIT_STOPPED
from tests.factory import make_tiny_model_folder
from tests.launches import Workplace, make_workplace, train_calls, write_jsonl
from tests.ranks import run_ranks


def poisoned(source: Path, folder: Path, value: float, where: str) -> Path:
    """A copy of a model folder whose lexical head holds `value`."""
    shutil.copytree(source, folder)
    head = torch.load(folder / "sparse_linear.pt", weights_only=True)
    head[where][:] = value
    torch.save(head, folder / "sparse_linear.pt")
    return folder


def bad_models(folder: Path) -> dict[str, list[str]]:
    foreign = make_tiny_model_folder(folder / "foreign", vocab_size=300)
    for name in ("tokenizer.json", "sentencepiece.bpe.model"):
        shutil.copy(folder / "model" / name, foreign)
    make_tiny_model_folder(folder / "headless", heads=False)
    make_tiny_model_folder(folder / "narrow", hidden_size=16)
    return {
        "foreign tokenizer": [f"model.path={foreign}"],
        "no heads": [f"model.path={folder}/headless"],
        "positions": ["data.passage_max_tokens=600"],
        "other model": ["name=skip", f"model.path={folder}/narrow"],
        "other data": ["name=skip", "train.seed=7"],
    }


def bad_data(folder: Path) -> dict[str, list[str]]:
    good = {"query": "a", "pos": ["b"]}
    files = {
        "malformed line": [good, good, '{"query": "a", "pos": ["b"'],
        "no pos": [good, {"query": "a"}],
        "empty query": [{"query": "  ", "pos": ["b"]}],
        "no records": [],
    }
    calls = {}
    for name, records in files.items():
        path = write_jsonl(folder / "bad" / f"{name.replace(' ', '-')}.jsonl", records)
        calls[name] = [f"data.train.0.paths=[{path}]", f"data.store_dir={folder}/bad/{path.stem}"]
    path = write_jsonl(folder / "bad" / "all-bad.jsonl", ["{", "[]"])
    calls["only bad records"] = [
        f"data.train.0.paths=[{path}]",
        f"data.store_dir={folder}/bad/all-bad",
        "data.on_bad_record=skip",
    ]
    calls["missing file"] = ["data.train.0.paths=[nowhere.jsonl]"]
    return calls


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    """Every call of this file, one after another in one process; results by name."""
    folder = place.folder
    poison = [f"model.path={poisoned(folder / 'model', folder / 'poisoned', float('nan'), 'bias')}"]
    dead = [f"model.path={poisoned(folder / 'model', folder / 'dead', -100.0, 'bias')}"]
    pairs = [{"query": f"a {i}", "pos": [f"b {i}"], "negs": ["c"]} for i in range(16)]
    mistyped = write_jsonl(folder / "mistyped" / "pairs.jsonl", [{**pairs[0], "zzz": 1}, *pairs[1:]])
    arguments = {
        "healthy": ["train.steps=4", "train.save_every_steps=2"],
        "unknown key": ["optim.lrr=1"],
        "wrong type": ["train.steps=many"],
        "poison": poison,
        "skip": [*poison, "engine.on_nonfinite=skip", "train.steps=2"],
        **bad_data(folder),
        **bad_models(folder),
        "dead": [*dead, "train.steps=1", "objective.preset=joint"],
        "hopeless": ["name=dead", *dead],
        "fallback": ["name=healthy", "train.steps=5"],
        "nothing to do": ["name=healthy", "train.steps=5"],
        "sweep": ["name=sweep", "train.steps=2"],
        "other lr": ["name=sweep", "train.steps=2", "optim.lr=5e-3"],
        "longer": ["name=sweep", "train.steps=3", "objective.temperature=0.05"],
        "past": ["name=sweep", "train.steps=1"],
        "no scores": ["objective.teacher=kl_div"],
        "no scores margin": [
            "objective.false_negative_margin=0.1",
            "objective.false_negative_margin_source=teacher",
        ],
        "ctrl-c": ["train.steps=4"],
        "negs": [
            f"data.train.0.paths=[{mistyped}]",
            f"data.store_dir={folder}/mistyped/store",
            "train.steps=1",
        ],
        "anew": ["name=healthy", "train.steps=1", "train.resume=never"],
    }
    damage = {
        "fallback": place.run("healthy") / "checkpoints" / "step-000004" / "state.json",
        "hopeless": place.run("dead") / "checkpoints" / "step-000001" / "COMPLETE",
    }
    made = [
        {
            "name": name,
            "arguments": [place.recipe, f"name={name.replace(' ', '-')}", *given],
            "damage": str(damage.get(name, "")),
            "record": str(place.run("sweep")) if name == "other lr" else "",
            **({"signal": (0, 1, "SIGINT")} if name == "ctrl-c" else {}),
        }
        for name, given in arguments.items()
    ]
    return run_ranks(train_calls, 1, [{"name": "no recipe", "arguments": []}, *made])[0]


MESSAGES = {
    "no recipe": ["recipe", "is required", "megam3 show-config --list"],
    "unknown key": ["optim.lrr (override optim.lrr=1) = 1: unknown key in optim; did you mean optim.lr?"],
    "wrong type": [
        "train.steps (override train.steps=many) = 'many': must be an integer",
        "write it without quotes or letters",
    ],
    "missing file": ["data.train.0.paths.0 = 'nowhere.jsonl': no such file or folder"],
    "malformed line": ["malformed-line.jsonl:3", "is not valid JSON", "data.on_bad_record: skip"],
    "no pos": ["no-pos.jsonl:2 pos", "must hold at least one passage"],
    "empty query": ["empty-query.jsonl:1 query", "must not be empty"],
    "no records": ["dataset pairs = '0 records rejected': holds no usable record; its files are empty"],
    "only bad records": [
        "dataset pairs = '2 records rejected': holds no usable record; see ",
        "rejects.jsonl for the reasons",
    ],
    "foreign tokenizer": [
        "foreign",
        "the tokenizer has",
        "rows",
        "use the tokenizer the encoder was trained with",
    ],
    "no heads": ["head weights are missing", "model.missing_heads: init"],
    "positions": ["data.passage_max_tokens = 600", "positions for 512 tokens", "megam3 extend-positions"],
    "other model": ["step-000002: model_signature", "parameters of another model", "train.resume=never"],
    "other data": [
        "data fingerprint",
        "the plan (seed, batch size, buckets, weights or draws) changed",
        "train.resume_with_other_data=true",
    ],
    "poison": [
        "step 1, rank 0: loss/total",
        "loss/lexical",
        "lexical/mean_weight",
        "not finite",
        "engine.on_nonfinite=skip",
    ],
    "past": [
        "train.steps = 1: ends at step 1, and the run is at step 3 already",
        "step-000003",
        "train.resume=never",
    ],
    "no scores": [
        "objective.teacher = 'kl_div': reads teacher scores, and no record of data.train holds any",
        "megam3 add-teacher-scores",
    ],
    "no scores margin": ["objective.false_negative_margin = 0.1", "objective.false_negative_margin=null"],
    "hopeless": ["must hold at least one complete checkpoint", "train.resume=never"],
}


@pytest.mark.parametrize("name", MESSAGES)
def test_bad_input_is_one_clear_message_and_code_2(calls: dict[str, dict], name: str) -> None:
    said = calls[name]["said"]
    assert calls[name]["code"] == 2, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("megam3: error: ")]
    assert len(lines) == 1, said
    assert not [part for part in MESSAGES[name] if part not in lines[0]], lines[0]


def test_a_refused_run_changes_nothing_of_the_one_it_would_have_continued(
    place: Workplace, calls: dict[str, dict]
) -> None:
    run = place.run("skip")
    recipe = load_config(run / "recipe.yaml")
    assert (recipe.model.path, recipe.train.seed, recipe.engine.template) == (
        str(place.folder / "poisoned"),
        42,
        "zero2",
    )
    assert (run / "model" / "config.json").read_bytes() == (
        place.folder / "model" / "config.json"
    ).read_bytes()
    assert len(place.rows("skip")) == 2


def test_a_non_finite_loss_stops_before_the_update_and_saves_nothing(
    place: Workplace, calls: dict[str, dict]
) -> None:
    assert not (place.run("poison") / "checkpoints").exists()


def test_skipping_leaves_the_weights_as_they_were(place: Workplace, calls: dict[str, dict]) -> None:
    assert calls["skip"]["code"] == 0, calls["skip"]["said"]
    assert "step 2 skipped: rank 0: loss/total" in calls["skip"]["said"]
    before, after = (
        consolidated_weights(str(place.run(name) / "checkpoints" / step))
        for name, step in (("skip", "step-000002"), ("healthy", "step-000001"))
    )
    source = torch.load(place.folder / "model" / "colbert_linear.pt", weights_only=True)
    torch.testing.assert_close(before["multi_vector_head.weight"], source["weight"], rtol=0, atol=0)
    assert not torch.equal(after["multi_vector_head.weight"], source["weight"])
    assert all(row["nonfinite"] for row in place.rows("skip"))


def test_a_dead_lexical_head_is_warned_of(calls: dict[str, dict]) -> None:
    assert calls["dead"]["code"] == 0, calls["dead"]["said"]
    assert "step 1: the lexical head is dying (lexical/nonzero_share = 0 < 0.001)" in calls["dead"]["said"]
    assert "is dying" not in calls["healthy"]["said"]


def test_text_over_the_limit_is_cut_and_counted(place: Workplace, calls: dict[str, dict]) -> None:
    manifest = json.loads((place.folder / "store" / "pairs" / "manifest.json").read_text())["totals"]
    assert manifest["truncated"] > 0
    assert (
        f"pairs: {manifest['truncated']} of {manifest['texts']} texts were longer than their"
        " limit and are cut" in calls["healthy"]["said"]
    )
    assert sum(row["data/truncated_texts"] for row in place.rows("skip")) > 0


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    place: Workplace, calls: dict[str, dict]
) -> None:
    said = calls["fallback"]["said"]
    assert calls["fallback"]["code"] == 0, said
    assert (
        "checkpoint step-000004 is not usable (state.json was changed after writing); trying the one before"
        in said
    )
    assert f"resumed from {place.run('healthy')}/checkpoints/step-000002" in said
    assert "starting at step 2" in said


def test_a_finished_run_started_again_does_nothing(calls: dict[str, dict]) -> None:
    assert calls["nothing to do"]["code"] == 0, calls["nothing to do"]["said"]
    assert "already finished: step 5 of 5; newest checkpoint: step 5" in calls["nothing to do"]["said"]


def test_a_second_run_under_a_finished_name_says_so_and_keeps_its_record(calls: dict[str, dict]) -> None:
    said = calls["other lr"]["said"]
    assert calls["other lr"]["code"] == 0, said
    assert "changed since the checkpoint: optim.lr: 0.001 -> 0.005" in said
    assert "none of these changes is trained: the run is finished" in said
    assert "already finished: step 2 of 2; newest checkpoint: step 2" in said
    before, after = calls["other lr"]["records"]
    assert sorted(before) == ["ds_config.json", "env.json", "recipe.yaml"]
    assert before == after


def test_a_resumed_run_says_what_changed(place: Workplace, calls: dict[str, dict]) -> None:
    said = calls["longer"]["said"]
    assert calls["longer"]["code"] == 0, said
    assert "changed since the checkpoint: train.steps: 2 -> 3" in said
    assert "changed since the checkpoint: objective.temperature: 0.02 -> 0.05" in said
    assert "none of these changes" not in said
    assert "objective.temperature" not in calls["sweep"]["said"]
    assert load_config(place.run("sweep") / "recipe.yaml").objective.temperature == 0.05


def test_ctrl_c_saves_and_says_where(place: Workplace, calls: dict[str, dict]) -> None:
    assert calls["ctrl-c"]["code"] == EXIT_STOPPED, calls["ctrl-c"]["said"]
    assert f"saved {place.run('ctrl-c')}/checkpoints/step-000002" in calls["ctrl-c"]["said"]
    assert "stopped at step 2 of 4; newest checkpoint: step 2" in calls["ctrl-c"]["said"]


def test_mistyped_keys_are_said_at_the_start(calls: dict[str, dict]) -> None:
    assert calls["negs"]["code"] == 0, calls["negs"]["said"]
    assert [line for line in calls["negs"]["said"].splitlines() if line.startswith("pairs: ")] == [
        "pairs: 16 records, 1.00 passages per query on average, teacher scores in 0 %",
        "pairs: each query has one passage and no negative of its own; "
        "it learns from the batch's others alone",
        "pairs: 16 of 16 records hold the key 'negs', which is not read; did you mean 'neg'?",
        "pairs: 1 of 16 records hold the key 'zzz', which is not read",
    ]
    assert "pairs: 40 records, 1.98 passages per query on average" in calls["healthy"]["said"]
    assert "is not read" not in calls["healthy"]["said"]


def test_starting_anew_sets_the_earlier_checkpoints_aside(place: Workplace, calls: dict[str, dict]) -> None:
    assert calls["anew"]["code"] == 0, calls["anew"]["said"]
    assert "checkpoints.before-1" in calls["anew"]["said"]
    assert [path.name for path in (place.run("healthy") / "checkpoints").glob("step-*")] == ["step-000001"]
    assert [row["step"] for row in place.rows("healthy")] == [1]
