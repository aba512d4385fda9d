"""`engine.template: auto`: what it picks, says and refuses; shipped recipes state what it picks."""

import json
import re
from pathlib import Path

import pytest

from megam3.cli import main
from megam3.config.deepspeed import build_deepspeed_config
from megam3.config.load import load_config
from megam3.data.lengths import LongestTexts
from megam3.errors import ConfigError
from megam3.model.expansion import BLOCK_ELEMENTS, MIN_BLOCK
from megam3.model.masked_lm import CHUNK_ROWS, MaskedLMHead
from megam3.planning import choice
from megam3.planning.choice import TRIED, apply, chosen, visible_gpu_bytes
from megam3.planning.memory import (
    activation_bytes,
    plan_memory,
)
from megam3.planning.memory_report import GIB
from megam3.planning.parameters import num_parameters
from megam3.planning.recipe import heaviest_step, read_model_shape, read_strategy, steps_of
from megam3.planning.vocabulary import EXPANSION_BLOCK, LOGIT_ROWS, MIN_EXPANSION_WIDTH
from tests.planning.test_memory_report import BGE_M3

RECIPES = ("unified", "contrastive", "pretrain")
CARDS = (16, 24, 40, 80, 141)
"""GiB: V100, L4 and 4090, A100, H100, H200."""


@pytest.fixture
def encoder(tmp_path) -> str:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (tmp_path / "config.json").write_text(json.dumps({**BGE_M3, **dropout}))
    return f"model.path={tmp_path}"


def _chosen(
    recipe: str, encoder: str, gib: float | None, *overrides: str, ranks: int = 8, on_gpu: bool = True
):
    memory_bytes = None if gib is None else int(gib * GIB)
    result = chosen(load_config(recipe, [encoder, *overrides]), ranks, memory_bytes, on_gpu=on_gpu)
    assert result is not None
    return result


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_every_card_the_choice_fits_and_a_larger_card_is_never_slower(recipe, ranks, encoder):
    costs, peaks = {}, {}
    for gib in CARDS:
        try:
            result = _chosen(recipe, encoder, gib, ranks=ranks)
        except ConfigError:
            # once something fits, it fits every larger card
            assert not costs, (gib, costs)
            continue
        config, record = result.config, result.record
        assert config.engine.template in TRIED
        assert build_deepspeed_config(config, ranks, has_gpu=True)["bf16"]["enabled"]
        model, strategy = read_model_shape(config), read_strategy(config, ranks, on_gpu=True)
        plan = plan_memory(model, strategy, heaviest_step(config, model, strategy)[1])
        assert plan.total_bytes <= record["chosen"]["planned_bytes"] <= record["limit_bytes"] < gib * GIB
        costs[gib] = record["chosen"]["compute_units"] + record["chosen"]["exposed_units"]
        peaks[gib] = plan.total_bytes
    assert 80 in costs
    assert list(costs.values()) == sorted(costs.values(), reverse=True)
    assert costs[min(costs)] > costs[141]


@pytest.mark.parametrize(("gib", "ranks"), [(24, 1), (40, 1), (6, 8)])
def test_where_nothing_fits_each_change_that_is_named_makes_it_fit(gib, ranks, encoder):
    with pytest.raises(ConfigError) as error:
        _chosen("unified", encoder, gib, ranks=ranks)
    message = str(error.value)
    assert "or run `megam3 prepare` first, if texts are shorter than the recipe allows" in message
    found = re.search(r"the smallest changes that would do, each by itself: (.*) GPUs of (\d+) GiB;", message)
    assert found is not None, message
    changes, card = found[1], int(found[2])
    assert _chosen("unified", encoder, card, ranks=ranks).record["fields"]
    assert changes, "not by larger cards alone"
    more = re.search(r"(\d+) ranks;", changes)
    if more is not None:
        assert _chosen("unified", encoder, gib, ranks=int(more[1])).record["fields"]
        with pytest.raises(ConfigError):  # the smallest: half as many do not do
            _chosen("unified", encoder, gib, ranks=int(more[1]) // 2)
    shorter = re.search(r"data.passage_max_tokens=(\d+) \(", changes)
    if shorter is not None:
        limit = int(shorter[1])
        limits = [f"data.passage_max_tokens={limit}", f"data.query_max_tokens={min(512, limit)}"]
        assert _chosen("unified", encoder, gib, *limits, ranks=ranks).record["fields"]


def test_a_chunk_that_is_too_large_is_the_first_thing_to_change(encoder):
    with pytest.raises(
        ConfigError, match=r"each by itself: data.batch.chunk_tokens=null, which lets smaller"
    ):
        _chosen("unified", encoder, 24, "data.batch.chunk_tokens=524288", ranks=8)


def test_short_texts_of_a_store_are_planned_as_short_as_they_are(encoder):
    config = load_config("unified", [encoder])
    longest = LongestTexts(query_tokens=64, text_tokens=2000)
    limit, stored = (chosen(config, 8, 80 * GIB, on_gpu=True, longest=lengths) for lengths in (None, longest))
    assert limit is not None
    assert stored is not None
    assert limit.lines[-1] == (
        "Planned for the recipe's limit of 8 192 tokens a text: there is no prepared store to ask."
    )
    assert stored.lines[-1] == (
        "Planned for texts of at most 2 000 tokens, the longest in the store (limit 8 192)."
    )
    assert stored.record["longest_text_tokens"] == 2000
    assert stored.record["chosen"]["compute_units"] <= limit.record["chosen"]["compute_units"]
    steps = steps_of(config, 8, longest)
    # buckets up to 500, 1000 and 2000 hold texts; the others are empty
    assert [edge for edge, _ in steps] == [500, 1000, 2000]
    assert all(step.query_tokens == 64 for _, step in steps)


def test_the_log_says_why_the_next_faster_does_not_fit(encoder):
    result = _chosen("unified", encoder, 80)
    assert re.search(r"may hold 74\.1 GiB a rank on 8 ranks$", result.lines[0])
    found = re.match(
        r"what is faster does not fit; the least of it: .* \(([\d.]+) GiB, 3\.\d\d", result.lines[1]
    )
    assert found is not None
    assert float(found[1]) > 74.1
    assert result.record["next_faster"]["planned_bytes"] > result.record["limit_bytes"]
    json.dumps(result.record)


def test_the_recipes_own_chunk_stays(encoder):
    result = _chosen("unified", encoder, 80, "data.batch.chunk_tokens=10000")
    assert result.config.data.batch.chunk_tokens == 10000


def test_pretraining_has_no_first_pass(encoder):
    assert _chosen("pretrain", encoder, 80).record["chosen"]["compute_units"] == 3
    assert _chosen("unified", encoder, 80).record["chosen"]["compute_units"] == 4


def test_on_cpus_one_rank_cuts_nothing_and_several_sum_in_fp32(encoder):
    one = _chosen("unified", encoder, None, ranks=1, on_gpu=False)
    assert (one.config.engine.template, one.config.data.batch.chunk_tokens) == ("zero0", 65536)
    small = ["data.batch.buckets=null", "data.batch.global_queries=4", "data.passage_max_tokens=512"]
    two = _chosen("unified", encoder, None, *small, ranks=2, on_gpu=False)
    assert (two.config.engine.template, two.config.data.batch.chunk_tokens) == ("zero2", None)
    assert "memory is planned for GPUs only" in two.lines[0]


def test_a_named_template_is_left_alone(encoder):
    assert chosen(load_config("unified", [encoder, "engine.template=zero3"]), 8, None, on_gpu=True) is None


def test_the_field_stands_in_for_a_device(encoder):
    by_field = _chosen("unified", encoder, None, "engine.gpu_memory_gib=40")
    assert by_field.record["fields"] == _chosen("unified", encoder, 40).record["fields"]


@pytest.mark.parametrize(
    ("gib", "overrides", "message"),
    [
        (
            None,
            [],
            r"engine.template = 'auto': plans for the memory of a GPU; none is visible here, and"
            r" engine.gpu_memory_gib is not set; set engine.gpu_memory_gib",
        ),
        (
            5,
            [],
            r"no setting fits 2.8 GiB a rank on 8 ranks; the least is [\d.]+ GiB, by engine.template=zero\S+"
            r" .*; the smallest changes that would do, each by itself: ",
        ),
        (
            80,
            ["engine.activation_checkpointing=true"],
            r"engine.activation_checkpointing = True: is decided by engine.template=auto; remove it",
        ),
        (80, ["engine.gradient_reduction=once"], r"engine.gradient_reduction = 'once': is decided by"),
    ],
)
def test_what_cannot_be_chosen_says_field_rule_and_remedy(encoder, gib, overrides, message):
    with pytest.raises(ConfigError, match=message):
        _chosen("unified", encoder, gib, *overrides)


def test_the_choice_written_out_is_no_longer_auto(encoder):
    result = _chosen("unified", encoder, 80)
    assert chosen(result.config, 8, None, on_gpu=True) is None
    assert apply(load_config("unified", [encoder]), result.record["fields"]) == result.config


def test_show_config_and_plan_memory_print_the_same_choice(encoder, capsys):
    assert main(["plan-memory", "unified", encoder, "--gpus", "8", "--gpu-memory", "80"]) == 0
    planned = capsys.readouterr().out.splitlines()[0]
    assert planned.startswith("engine.template=auto: engine.template=zero")
    arguments = [encoder, "engine.gpu_memory_gib=80", "--gpu", "--world-size", "8", "--no-files"]
    assert main(["show-config", "unified", *arguments]) == 0
    shown = capsys.readouterr().out
    assert f"# {planned}" in shown
    assert f"  template: {_chosen('unified', encoder, 80).config.engine.template}\n" in shown


def test_a_driver_is_asked_for_the_smallest_gpu(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert visible_gpu_bytes() == 40960 << 20
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpu_bytes() is None
    Path(tool).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpu_bytes() is None


def test_rows_of_logits_are_the_models():
    assert LOGIT_ROWS == CHUNK_ROWS


def test_blocks_of_the_expansion_head_are_the_models():
    assert (EXPANSION_BLOCK, MIN_EXPANSION_WIDTH) == (BLOCK_ELEMENTS, MIN_BLOCK)


def test_an_expansion_head_is_counted_whole(encoder):
    """Its weights are those of the real head; at its peak the embedding matrix's gradient is there too."""
    options = [encoder, "engine.template=zero0", "model.lexical_kind=expansion"]
    config, plain = load_config("unified", options), load_config("unified", options[:2])
    shape, without = read_model_shape(config), read_model_shape(plain)
    head = MaskedLMHead(shape.hidden_size, shape.vocab_size, 1e-5)
    own = sum(parameter.numel() for parameter in head.parameters())
    assert num_parameters(shape) - num_parameters(without) == own - (shape.hidden_size + 1)
    strategy = read_strategy(config, 1, on_gpu=True)
    tokens = 1024
    more = activation_bytes(shape, strategy, tokens, 512) - activation_bytes(without, strategy, tokens, 512)
    assert more > strategy.precision_bytes * BLOCK_ELEMENTS


def test_dense_alone_keeps_no_rows_of_the_multi_vector_head(encoder):
    dense, all_heads = (
        load_config("contrastive", [encoder, f"objective.heads={heads}", "engine.template=zero2"])
        for heads in ("[dense]", "[dense,lexical,multi_vector]")
    )
    few, many = read_model_shape(dense), read_model_shape(all_heads)
    assert num_parameters(many) - num_parameters(few) == 1025 + 1024 * 1025
    strategy = read_strategy(dense, 8, on_gpu=True)
    step = max((step for _, step in steps_of(dense, 8)), key=lambda step: step.num_tokens)
    plans = [plan_memory(model, strategy, step).step for model in (few, many)]
    assert sum(plans[0].values()) < sum(plans[1].values())
    assert choice.MARGIN > 0
