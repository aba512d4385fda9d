"""RetroMAE and masked LM from a recipe: two ranks under ZeRO stages, chunks, resume, bad input."""

import pytest

from megam3.config.load import load_config
from megam3.errors import CheckpointError, ConfigError
from megam3.model.pretrained import load_tokenizer_of
from megam3.objectives import pretrain
from tests.factory import make_sentences, write_tiny_tokenizer
from tests.launches import Workplace, make_workplace, train_calls, write_jsonl
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("pretrain"))


def run(place: Workplace, arguments: dict[str, list[str]], signal: tuple[str, int] | None = None) -> dict:
    """Runs of eight steps on two ranks, by name; `signal`: the run that is stopped, after which step, and is
    then started again as `rest`."""
    sentences = make_sentences(40, min_words=5, max_words=30)
    texts = write_jsonl(place.folder / "texts.jsonl", [{"text": sentence} for sentence in sentences])
    stage = [
        "objective.kind=pretrain",
        f"data.train.0.paths=[{texts}]",
        f"data.store_dir={place.folder}/texts",
        "train.steps=8",
    ]
    calls = [
        {"name": name, "arguments": [place.recipe, f"name={name}", *stage, *given]}
        for name, given in arguments.items()
    ]
    for call in [call for call in calls if signal and call["name"] == signal[0]]:
        calls.append({**call, "name": "rest"})
        call["signal"] = (0, signal[1], "SIGTERM")
    return run_ranks(train_calls, 2, calls)[0]


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    no_dropout = ["model.hidden_dropout=0", "model.attention_dropout=0"]
    arguments = {
        "zero0": ["engine.template=zero0", *no_dropout],
        "zero3": ["engine.template=zero3", *no_dropout],
        "chunks": ["engine.template=zero3", *no_dropout, "data.batch.chunk_tokens=64"],
        "plain": ["engine.template=zero3", "objective.decoder=false"],
        "shares": ["objective.mask_token_share=0.95"],
    }
    return run(place, arguments)


@pytest.mark.ranks
def test_it_learns_and_every_stage_and_chunking_gives_the_same_losses(calls: dict, place: Workplace) -> None:
    losses = {}
    for name in ("zero0", "zero3", "chunks"):
        assert calls[name]["code"] == 0, calls[name]["said"]
        losses[name] = [(row["loss/encoder"], row["loss/decoder"]) for row in place.rows(name)]
    assert sum(losses["zero0"][-1]) < sum(losses["zero0"][0])
    for name in ("zero3", "chunks"):
        for a, b in zip(losses["zero0"], losses[name], strict=True):
            assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.ranks
def test_plain_masked_lm_has_no_decoder_loss(calls: dict, place: Workplace) -> None:
    assert calls["plain"]["code"] == 0, calls["plain"]["said"]
    assert all("loss/decoder" not in row for row in place.rows("plain"))


@pytest.mark.ranks
def test_it_resumes_exactly_with_dropout_two_batches_a_step_and_bags(place: Workplace) -> None:
    given = [
        "engine.template=zero3",
        "data.batch.accumulation_steps=2",
        "objective.bag_of_words_weight=0.5",
    ]
    halves = [*given, "train.save_every_steps=4"]
    calls = run(place, {"halves": halves, "whole": given}, ("halves", 3))
    assert calls["halves"]["code"] != 0
    assert calls["rest"]["code"] == 0, calls["rest"]["said"]
    assert place.figures("halves") == place.figures("whole")
    rows = place.figures("whole")
    for row in rows:
        parts = row["loss/encoder"] + row["loss/decoder"] + 0.5 * row["loss/bag_of_words"]
        assert row["loss/total"] == pytest.approx(parts, rel=1e-6)
    assert rows[-1]["loss/bag_of_words"] < rows[0]["loss/bag_of_words"]


@pytest.mark.parametrize("value", ["-0.1", "yes"])
def test_a_bag_of_words_weight_that_is_no_weight_is_one_clear_message(place: Workplace, value: str) -> None:
    given = ["objective.kind=pretrain", f"objective.bag_of_words_weight={value}"]
    with pytest.raises(
        ConfigError, match=r"objective\.bag_of_words_weight .*must be (a number|greater than)"
    ):
        load_config(place.recipe, given)


@pytest.mark.ranks
def test_shares_that_exceed_the_whole_are_one_clear_message(calls: dict) -> None:
    assert calls["shares"]["code"] == 2
    said = calls["shares"]["said"]
    assert "objective.random_token_share = 0.1: must be at most 1 - mask_token_share = 0.05" in said
    assert "Traceback" not in said


def test_a_tokenizer_without_a_mask_token_cannot_hide_words(tmp_path, monkeypatch):
    write_tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer_of(str(tmp_path))
    tokenizer.mask_token = None
    monkeypatch.setattr(pretrain, "load_tokenizer_of", lambda path: tokenizer)
    with pytest.raises(CheckpointError, match="its tokenizer has no mask token.*masked-language model's"):
        pretrain.read_vocabulary_tables(str(tmp_path), 600)
