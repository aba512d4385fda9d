"""RetroMAE and masked LM from a recipe: two ranks under ZeRO stages, chunks, resume, bad input."""

import pytest

from tests.factory import make_sentences
from tests.launches import Workplace, make_workplace, train_calls, write_jsonl
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    sentences = make_sentences(40, min_words=5, max_words=30)
    texts = write_jsonl(place.folder / "texts.jsonl", [{"text": sentence} for sentence in sentences])
    stage = [
        "objective.kind=pretrain",
        f"data.train.0.paths=[{texts}]",
        f"data.store_dir={place.folder}/texts",
        "train.steps=8",
    ]
    no_dropout = ["model.hidden_dropout=0", "model.attention_dropout=0"]
    arguments = {
        "zero0": ["engine.template=zero0", *no_dropout],
        "zero3": ["engine.template=zero3", *no_dropout],
        "chunks": ["engine.template=zero3", *no_dropout, "data.batch.chunk_tokens=64"],
        "plain": ["engine.template=zero3", "objective.decoder=false"],
        "halves": ["engine.template=zero3", "train.save_every_steps=4"],
        "whole": ["engine.template=zero3"],
        "shares": ["objective.mask_token_share=0.95"],
    }
    named = [
        {"name": name, "arguments": [place.recipe, f"name={name}", *stage, *given]}
        for name, given in arguments.items()
    ]
    named[4]["signal"] = (0, 3, "SIGTERM")
    again = {**named[4], "name": "rest"}
    del again["signal"]
    return run_ranks(train_calls, 2, [*named, again])[0]


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
def test_it_resumes_exactly(calls: dict, place: Workplace) -> None:
    assert calls["halves"]["code"] != 0
    assert calls["rest"]["code"] == 0, calls["rest"]["said"]
    assert place.figures("halves") == place.figures("whole")


@pytest.mark.ranks
def test_shares_that_exceed_the_whole_are_one_clear_message(calls: dict) -> None:
    assert calls["shares"]["code"] == 2
    said = calls["shares"]["said"]
    assert "objective.random_token_share = 0.1: must be at most 1 - mask_token_share = 0.05" in said
    assert "Traceback" not in said
