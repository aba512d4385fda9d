"""How often the host waits for the device in a step of pretraining, counted on the pretended device."""

import pytest
import torch

from megam3.batch import Progress, TextBatch
from megam3.config.objective import PretrainConfig
from megam3.config.schema import ModelConfig
from megam3.dist import comm
from megam3.objectives.pretrain import PretrainObjective
from megam3.packed_texts import pack_texts
from tests.factory import make_tiny_model_folder, random_token_ids
from tests.gpu.pretend_device import _register
from tests.gpu.pretend_step import PlainEngine, step_on_device
from tests.gpu.test_synchronisations import STEP_WAITS
from tests.ranks import run_ranks

SECTIONS = {
    "retromae and bags": PretrainConfig(bag_of_words_weight=0.4),
    "retromae": PretrainConfig(decoder_mask_share=0.7),
    "masked language model and bags": PretrainConfig(decoder=False, bag_of_words_weight=2.0),
    "masked language model": PretrainConfig(decoder=False),
}
CHUNKS = (None, 40)
TEXTS = random_token_ids((9, 2, 31, 14, 33, 3, 24), seed=5)
BATCHES = ((0, 1, 2, 3, 4), (5, 6))
STEP = 3


def batch_of(rows):
    return TextBatch(
        texts=pack_texts([TEXTS[row] for row in rows]),
        document_offsets_N1=torch.arange(len(rows) + 1),
        rows=torch.tensor(rows, dtype=torch.int64),
    )


def load(folder, section, chunk_tokens):
    objective = PretrainObjective(section, chunk_tokens)
    torch.manual_seed(0)  # the head and the decoder start at random
    return objective, objective.load_model(ModelConfig(path=folder), torch.float64).train()


def _measure(folder):
    """For each section, in one pass and in chunks: the step on the pretended device, and the gradients of one
    on the CPU."""
    _register()
    results = {}
    for name, section in SECTIONS.items():
        for chunk_tokens in CHUNKS:
            objective, model = load(folder, section, chunk_tokens)
            plain, progress = PlainEngine(model), Progress(step=STEP)
            for prepared in objective.prepare([batch_of(rows) for rows in BATCHES], progress):
                objective.run(plain, prepared, progress)
            objective, model = load(folder, section, chunk_tokens)
            with pytest.MonkeyPatch.context() as monkeypatch:
                result = step_on_device(monkeypatch, model, objective, list(map(batch_of, BATCHES)), STEP)
            result["expected"] = {n: p.grad for n, p in plain.model.named_parameters()}
            results[name, chunk_tokens] = result
    return results


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = make_tiny_model_folder(tmp_path_factory.mktemp("model"), heads=False)
    return run_ranks(_measure, 1, str(folder))[0]


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_the_pretended_device_computes_what_the_cpu_does(measured, name, chunk_tokens):
    result = measured[name, chunk_tokens]
    # texts of 9+2, 31, 14 and 33 tokens, then of 3+24
    assert result["chunks"] == (5 if chunk_tokens else 2)
    for key, gradient in result["expected"].items():
        found = result["gradients"][key]
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", SECTIONS)
def test_a_step_waits_for_its_counts_and_figures_and_a_chunk_for_nothing(measured, name):
    waits = [measured[name, chunk_tokens]["waits"] for chunk_tokens in CHUNKS]
    assert waits[0] == waits[1]
    assert len(waits[0]) <= STEP_WAITS, waits[0]
    # one rank; what several tell each other is one more
    assert len(waits[0]) == 2, waits[0]


def _measure_together(folder):
    _register()
    results = []
    for chunk_tokens in CHUNKS:
        objective, model = load(folder, SECTIONS["retromae and bags"], chunk_tokens)
        # the second batch of the other rank is empty, and both run as many passes
        shares = (((0, 1, 2, 3), (6,)), ((4, 5), ()))[comm.rank()]
        with pytest.MonkeyPatch.context() as monkeypatch:
            result = step_on_device(monkeypatch, model, objective, list(map(batch_of, shares)), STEP)
        results.append({name: result[name] for name in ("loss", "chunks", "waits")})
    return results


@pytest.mark.ranks
def test_several_ranks_wait_once_more_for_what_they_tell_each_other(measured, tmp_path):
    folder = make_tiny_model_folder(tmp_path / "model", heads=False)
    for results in run_ranks(_measure_together, 2, str(folder)):
        # texts of 9+2, 31 and 14 tokens and of 24; the other rank, with 33+3 and nothing, runs fillers
        assert [result["chunks"] for result in results] == [2, 4]
        assert results[0]["waits"] == results[1]["waits"]
        assert len(results[0]["waits"]) == 3 <= STEP_WAITS, results[0]["waits"]
        for result in results:
            assert result["loss"] == pytest.approx(measured["retromae and bags", None]["loss"], rel=1e-9)
