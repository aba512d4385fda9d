"""What stays on the device when layer inputs are offloaded: on a fake device that counts, over the chunks of
one step."""

import gc

import pytest
import torch
from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload

from megam3.config.schema import ModelConfig
from megam3.engine.activations import LAYERS_AHEAD, ActivationMemory, InputStash
from megam3.model.m3 import represent
from megam3.model.pretrained import load_m3
from megam3.packed_texts import pack_texts
from tests.factory import make_tiny_model_folder, random_token_ids
from tests.gpu.fake_accelerator import install

LAYERS, HIDDEN = 6, 32
CHUNKS = [(30, 7, 12), (41, 4), (20, 17, 3)]
"""Lengths of the texts of three chunks, no two with as many tokens."""
PIECE_BYTES = 8 * HIDDEN * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(
        make_tiny_model_folder(tmp_path_factory.mktemp("model"), hidden_size=HIDDEN, num_layers=LAYERS)
    )


def chunks():
    return [pack_texts(random_token_ids(lengths, seed=n)) for n, lengths in enumerate(CHUNKS)]


def surrogate(model, texts):
    return sum(x.float().square().sum() for x in represent(model, texts).floats())


def watched(fake, copies):
    """Let the fake see every tensor that goes into a copy and every one that comes out."""
    send, bring_back = copies.offload_input, copies._restore_tensor

    def offload_input(tensor):
        fake.watch(tensor)
        return send(tensor)

    def restore(tensor_id, cache=True):
        tensor = bring_back(tensor_id, cache)
        fake.watch(tensor)
        return tensor

    copies.offload_input, copies._restore_tensor = offload_input, restore
    return copies


def run_chunks(folder, monkeypatch, offload):
    """Gradients; live bytes after each forward and each backward pass; the pinned buffers made."""
    fake = install(monkeypatch)
    model = load_m3(folder, ModelConfig(path=folder)).train()
    activations = ActivationMemory(model, True, offload, PIECE_BYTES)
    if offload:
        watched(fake, activations._stash._copies)
    after_forward, after_backward, buffers = [], [], []
    with activations.step():
        for texts in chunks():
            loss = surrogate(model, texts)
            gc.collect()
            after_forward.append(fake.live_bytes())
            loss.backward()
            del loss
            gc.collect()
            after_backward.append(fake.live_bytes())
            activations.check_released()
            buffers.append(fake.pinned_allocations)
    return {n: p.grad for n, p in model.named_parameters()}, after_forward, after_backward, buffers


def test_nothing_stays_after_a_backward_pass_and_gradients_are_the_same(folder, monkeypatch):
    plain, *_ = run_chunks(folder, monkeypatch, False)
    gradients, after_forward, after_backward, _ = run_chunks(folder, monkeypatch, True)
    assert after_backward == [0, 0, 0]
    for texts, live in zip(chunks(), after_forward):
        assert live <= (LAYERS_AHEAD + 1) * texts.num_tokens * HIDDEN * 4, (
            "inputs leave the device in the forward pass"
        )
    for name, gradient in plain.items():
        assert torch.equal(gradients[name], gradient), name


def test_buffers_of_the_first_chunk_serve_smaller_ones(folder, monkeypatch):
    *_, buffers = run_chunks(folder, monkeypatch, True)
    # every input but the last layer's, in whole pieces of 8 rows
    assert buffers == [(LAYERS - 1) * (max(map(sum, CHUNKS)) // 8)] * 3


def test_deepspeeds_own_hooks_keep_every_input_until_the_step_ends(folder, monkeypatch):
    """Why the hooks are ours; when this fails, DeepSpeed has mended it and its context can be used again."""
    fake = install(monkeypatch)
    model = load_m3(folder, ModelConfig(path=folder)).train()
    manager = watched(fake, CheckpointHiddenStatesOffload(min_offload_bytes=1, max_fwd_stash_count=0))
    ActivationMemory(model, True, False)
    layers = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    for layer in layers:
        plain = layer._gradient_checkpointing_func

        def marked(function, *args, plain=plain):
            manager.mark(args[0])
            return plain(function, *args)

        layer._gradient_checkpointing_func = marked
    kept = []
    with manager:
        for texts in chunks():
            surrogate(model, texts).backward()
            gc.collect()
            kept.append(fake.live_bytes())
    tokens = torch.tensor([texts.num_tokens for texts in chunks()]).cumsum(0)
    assert kept == (LAYERS * tokens * HIDDEN * 4).tolist()


def test_an_input_that_no_backward_pass_fetches_is_reported(folder, monkeypatch):
    install(monkeypatch)
    model = load_m3(folder, ModelConfig(path=folder)).train()
    activations = ActivationMemory(model, True, True, PIECE_BYTES)
    with activations.step():
        surrogate(model, chunks()[0])
        with pytest.raises(AssertionError, match=f"{LAYERS - 1} offloaded layer inputs were not fetched"):
            activations.check_released()
    activations.check_released()


def test_an_input_comes_back_once(monkeypatch):
    install(monkeypatch)
    stash = InputStash(1024)
    away = stash.send(torch.arange(2600.0).view(1, 650, 4))
    assert torch.equal(stash.bring_back(away), torch.arange(2600.0).view(1, 650, 4))
    with pytest.raises(RuntimeError, match="no longer tracked"):
        stash.bring_back(away)
