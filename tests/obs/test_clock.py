import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import XLMRobertaConfig, XLMRobertaModel

from megam3.encoders import EncoderShape
from megam3.obs import clock as clock_module
from megam3.obs.clock import StepClock, measure_matmul_peak, peak_memory_bytes


@pytest.mark.parametrize("length", [5, 33])
def test_flops_formula_equals_torchs_counter_on_a_real_encoder(length):
    config = XLMRobertaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=64,
    )
    model = XLMRobertaModel._from_config(config, add_pooling_layer=False, attn_implementation="eager").eval()
    colbert = torch.nn.Linear(32, 16)
    lexical = torch.nn.Linear(32, 1)
    ids = torch.full((2, length), 7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state
        colbert(hidden), lexical(hidden)
    shape = EncoderShape(num_layers=3, hidden_size=32, intermediate_size=80, multi_vector_dim=16)
    assert shape.forward_flops([length, length]) == counter.get_total_flops()
    assert shape.training_flops([length]) == 3 * shape.forward_flops([length])


def test_attention_is_counted_per_text_not_over_the_stream():
    shape = EncoderShape(num_layers=1, hidden_size=8, intermediate_size=8)
    assert shape.forward_flops([10, 10]) == 2 * shape.forward_flops([10])
    assert shape.forward_flops([20]) > shape.forward_flops([10, 10])


def test_clock_reads_a_window_and_starts_a_new_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megam3.obs.clock.time.perf_counter", lambda: now[0])
    clock = StepClock(peak_flops_per_second=1000.0)
    clock.add(50, flops=400)
    clock.add(50, flops=400)
    now[0] = 2.0
    speed = clock.read()
    assert (speed.seconds, speed.tokens_per_second, speed.peak_share) == (2.0, 50.0, 0.4)
    now[0] = 3.0
    assert clock.read().tokens_per_second == 0.0
    assert StepClock().read().peak_share is None


def test_waiting_for_data_is_part_of_the_window(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megam3.obs.clock.time.perf_counter", lambda: now[0])

    def batches():
        for number in range(3):
            now[0] += 0.25  # to make a batch
            yield number

    clock, seen = StepClock(), []
    for number in clock.waiting_for(batches()):
        seen.append(number)
        now[0] += 0.75  # to train on it
    speed = clock.read()
    assert seen == [0, 1, 2]
    assert (speed.seconds, speed.data_wait_share) == (3.0, 0.25)
    now[0] = 4.0
    assert clock.read().data_wait_share == 0.0


def test_peak_and_memory_are_positive():
    assert measure_matmul_peak(size=64, min_seconds=0.01) > 0
    before = peak_memory_bytes()
    block = torch.ones(2_000_000)
    assert peak_memory_bytes() >= before > block.numel()


def test_a_pause_belongs_to_no_window(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(clock_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    clock = StepClock()
    now[0] += 2.0
    clock.add(300)
    with clock.paused():
        now[0] += 40.0
    now[0] += 1.0
    assert clock.read().tokens_per_second == 100.0
