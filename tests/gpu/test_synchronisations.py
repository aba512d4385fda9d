"""How often the host waits for the device in a step, counted on a pretended device with real numbers."""

from dataclasses import replace

import pytest
import torch

from megam3.batch import Progress
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig
from megam3.dist import comm
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from megam3.scoring import lexical, maxsim, sparse
from tests.batches import make_groups, split_over_ranks
from tests.factory import make_tiny_model_folder
from tests.gpu import varlen_stand_in
from tests.gpu.pretend_device import Pretend, PretendTensor, _register, unwrapped
from tests.gpu.pretend_step import PlainEngine, step_on_device
from tests.ranks import run_ranks

CONFIG = UnifiedConfig(temperature=0.2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = make_tiny_model_folder(tmp_path_factory.mktemp("model"), num_layers=2)
    return run_ranks(_measure, 1, str(folder))[0]


def _measure(folder):
    """For one pass and for chunks: gradients on CPU and on the pretended device, chunks, waits, launches."""
    _register()
    results = {}
    for chunk_tokens in (None, 60):
        with pytest.MonkeyPatch.context() as monkeypatch:
            varlen_stand_in.install(monkeypatch, any_dtype=True)
            plain = PlainEngine(load_m3(folder, ModelConfig(path=folder)).train())
            UnifiedObjective(CONFIG, chunk_tokens).run(plain, share(), Progress(step=0))
        with pytest.MonkeyPatch.context() as monkeypatch:
            results[chunk_tokens or 0] = _on_device(folder, monkeypatch, chunk_tokens)
        results[chunk_tokens or 0]["expected"] = {n: p.grad for n, p in plain.model.named_parameters()}
    return results


def _on_device(folder, monkeypatch, chunk_tokens):
    for module in (maxsim, lexical):
        for name in ("csr_product", "transposed_csr", "sampled_product", "transposed_pattern"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, unwrapped(getattr(sparse, name)))
    model = load_m3(folder, ModelConfig(path=folder)).train()
    batch = loaded_batch(model.special_ids)
    return step_on_device(monkeypatch, model, UnifiedObjective(CONFIG, chunk_tokens), [batch])


def share():
    """This rank's share of four groups."""
    return split_over_ranks(make_groups(4), comm.rank(), comm.world_size())


def loaded_batch(special_ids):
    """A batch as the loader hands it over: with the pairs of its texts."""
    batch = share()
    # no question is asked twice: those of a batch are compared on the host
    hashes = batch.rows_Q.clone()
    return replace(batch, texts=batch.texts.with_pairs(special_ids), query_hashes_Q=hashes)


@pytest.mark.parametrize("chunk_tokens", [0, 60])
def test_the_pretended_device_computes_what_the_cpu_does(measured, chunk_tokens):
    result = measured[chunk_tokens]
    assert result["chunks"] > 1 if chunk_tokens else result["chunks"] == 1
    for name, gradient in result["expected"].items():
        torch.testing.assert_close(result["gradients"][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def _see_waits():
    with Pretend() as device:
        x = torch.arange(4, device=device.device)
        host = torch.ones(2)
        assert isinstance(x, PretendTensor)
        assert x.sum().item() == 6
        assert x.tolist() == [0, 1, 2, 3]
        assert torch.unique(x).shape == (4,)
        assert x[x > 1].shape == (2,)
        assert x[[2, 0]].shape == (2,)
        host.to(device.device)
        device.pin(host).to(device.device)
        x.new_tensor([1])
        two = torch.arange(2, 3, device=device.device)
        for unsafe in (False, True):
            torch.segment_reduce(x[:2].float(), "max", lengths=two, unsafe=unsafe)
        with pytest.raises(AssertionError, match="host tensors"):
            torch.add(torch.zeros(2, device=device.device), host)
    return [what for what, _ in device.syncs]


def test_waits_are_seen():
    assert run_ranks(_see_waits, 1)[0] == [
        "_local_scalar_dense",
        "_to_copy to the host",
        "_unique2",
        "index by a mask",
        "_to_copy from pageable memory",
        "_to_copy from pageable memory",
        "_to_copy from pageable memory",
        "segment_reduce checks its lengths",
        "segment_reduce checks its lengths",
    ]


STEP_WAITS = 4
"""Of one step, from the pinned batch to the figures for the log. On one rank they alone are waited for; three
are left for what ranks tell each other."""


def test_a_step_waits_for_its_figures_and_a_chunk_for_nothing(measured):
    for chunk_tokens, result in measured.items():
        assert len(result["waits"]) <= STEP_WAITS, (chunk_tokens, result["waits"])
    assert measured[60]["chunks"] > 1
    assert measured[60]["waits"] == measured[0]["waits"]


RANKS_WAIT = 3
"""Of one step on several ranks beyond the one for its figures: the number of chunks, how many texts all ranks
hold, pairs and rows and hash of each of their queries. None of them in a chunk."""


def _measure_together(folder):
    _register()
    results = {}
    for chunk_tokens in (None, 60):
        with pytest.MonkeyPatch.context() as monkeypatch:
            result = _on_device(folder, monkeypatch, chunk_tokens)
        results[chunk_tokens or 0] = {name: result[name] for name in ("loss", "chunks", "waits")}
    return results


@pytest.mark.ranks
def test_several_ranks_wait_for_what_they_tell_each_other(measured, tmp_path):
    folder = make_tiny_model_folder(tmp_path / "model", num_layers=2)
    for result in run_ranks(_measure_together, 2, str(folder)):
        for chunk_tokens, found in result.items():
            assert found["loss"] == pytest.approx(measured[chunk_tokens]["loss"], rel=1e-5)
            assert len(found["waits"]) <= 1 + RANKS_WAIT - (not chunk_tokens) <= STEP_WAITS, found["waits"]
            assert not [wait for wait in found["waits"] if "pageable" in wait[0]]
        assert result[60]["chunks"] > 1


def test_attention_is_one_launch_a_layer(measured):
    layers = 2
    assert measured[0]["attention_launches"] == layers
    # without a graph, then with one
    assert measured[60]["attention_launches"] == 2 * layers * measured[60]["chunks"]
