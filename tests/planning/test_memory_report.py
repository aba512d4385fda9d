"""The command: what it prints, recommends, and refuses."""

import json
from dataclasses import replace

import pytest

from megam3.cli import main
from megam3.config.batch_size import queries_in_buckets
from megam3.config.check import check_config
from megam3.config.load import load_config
from megam3.planning.memory import plan_memory
from megam3.planning.recipe import heaviest_step, read_model_shape, read_strategy
from tests.planning.families import small
from tests.planning.memory_probe import probe

BGE_M3 = {
    "model_type": "xlm-roberta",
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "vocab_size": 250_002,
    "max_position_embeddings": 8194,
    "pad_token_id": 1,
}


@pytest.fixture
def encoder(tmp_path):
    def write(**changes) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**BGE_M3, **changes}))
        return f"model.path={tmp_path}"

    return write


EIGHT_K = [
    "engine.template=zero3_8k",
    "engine.activation_checkpointing=true",
    "engine.activation_offload=true",
    "data.batch.chunk_tokens=65536",
]
"""The setting that needs least of the GPUs' memory among those without offload of states."""

SMALL = [
    "data.batch.buckets=null",
    "data.batch.global_queries=16",
    "engine.template=zero1",
    "engine.activation_offload=false",
]


def _run(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["plan-memory", "unified", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_table_adds_up_to_its_peak(capsys, encoder):
    code, text = _run(capsys, encoder(), *EIGHT_K, "--gpus", "8")
    assert code == 0
    lines = text.split("\n\n")[0].splitlines()
    rows = {line[:24].strip(): float(line.split()[-1]) for line in lines if line.startswith("  ")}
    assert rows["peak"] == pytest.approx(sum(v for k, v in rows.items() if k != "peak"), abs=0.05)
    assert "Memory of one of 8 ranks in GiB: zero3_8k (ZeRO 3), bf16, checkpointing on, offload on" in text
    assert {"weights", "gradients", "optimizer", "representations"} <= rows.keys()


def test_it_recommends_a_chunk_that_the_arithmetic_accepts(capsys, encoder):
    path = encoder()
    code, text = _run(capsys, path, *SMALL, "--gpus", "8", "--gpu-memory", "16")
    assert code == 0
    chunk = int(text.split("data.batch.chunk_tokens=")[1].split()[0])
    config = load_config("unified", [path, *SMALL, f"data.batch.chunk_tokens={chunk}"])
    model, strategy = read_model_shape(config), read_strategy(config, 8, on_gpu=True)
    total = plan_memory(model, strategy, heaviest_step(config, model, strategy)[1]).total_bytes
    assert 0.99 * 14 < total / 2**30 <= 14


def test_the_fastest_setting_that_fits_starts_and_fits(capsys, encoder):
    path = encoder()
    code, text = _run(capsys, path, "--gpus", "8", "--gpu-memory", "80")
    assert code == 0
    lines = text.split("Fastest that fits in 78.0 GiB")[1].splitlines()[1:]
    costs = [float(line.split()[0]) for line in lines]
    assert costs == sorted(costs)
    assert len(costs) > 1
    config = load_config("unified", [path, *lines[0].split()[3:]])
    assert check_config(config, 8, files=False) is None
    model, strategy = read_model_shape(config), read_strategy(config, 8, on_gpu=True)
    assert plan_memory(model, strategy, heaviest_step(config, model, strategy)[1]).total_bytes <= 78 << 30
    # stage 3, checkpointing, offload and chunks would cost 5
    assert costs[0] < 4.1


def test_no_setting_is_said_with_the_templates_that_were_tried(capsys, encoder):
    _, text = _run(capsys, encoder(), *EIGHT_K, "--gpu-memory", "3")
    assert "No setting of the templates zero0, zero1, zero2, zero3, zero3_8k fits in 1.0 GiB." in text


def test_it_says_what_to_turn_on(capsys, encoder):
    off = "engine.activation_checkpointing=false"
    code, text = _run(capsys, encoder(), *SMALL, off, "--gpus", "8", "--gpu-memory", "12")
    assert code == 0
    assert "Does not fit in 10.0 GiB. Turn on: engine.activation_checkpointing=true" in text


def test_what_cannot_fit_is_said_with_its_number_and_code_1(capsys, encoder):
    code, text = _run(capsys, encoder(), *EIGHT_K, "--gpu-memory", "3")
    assert code == 1
    assert "Does not fit in 1.0 GiB by any setting known here" in text
    assert "shorter texts, a smaller batch, or more ranks" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "deberta-v2"},
            "(deberta-v2)': is an encoder whose activations this command has not counted; use one of: bert",
        ),
        (
            {"num_hidden_layers": None},
            "config.json: num_hidden_layers = None: must be a number; use the encoder's own config.json",
        ),
    ],
)
def test_encoders_that_are_not_counted_are_refused(capsys, encoder, changes, message):
    code, text = _run(capsys, encoder(**changes))
    assert code == 2
    assert message in text


SIZES = {"hidden_size": 256, "intermediate_size": 512}
PROCESSES = {
    "one pass": {},
    "checkpointing": {"checkpointing": True},
    "chunks": {"chunk_tokens": 1024},
    "dropout": {"dropout": 0.1},
    "Qwen 3": {"config": small("qwen3", 4, **SIZES)},
    "Qwen 3, chunks": {"config": small("qwen3", 4, **SIZES), "chunk_tokens": 1024},
    "EmbeddingGemma": {"config": small("gemma3_text", 6, **{**SIZES, "hidden_size": 384})},  # three heads
    "ModernBERT": {"config": small("modernbert", 4, **SIZES)},
    "Llama, checkpointing": {"config": small("llama", 4, **SIZES), "checkpointing": True},
    "LoRA": {"lora_rank": 8},
    "a block in the multi-vector head": {"multi_vector_hidden": 2048, "num_layers": 2},
    "frozen below": {"freeze": ["embeddings", "layers 0..1"], "checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_the_planned_peak_is_the_one_a_process_reaches(name):
    result = probe(PROCESSES[name])
    assert result["planned"] == pytest.approx(result["measured"], rel=0.1), result


@pytest.mark.slow
@pytest.mark.ranks
def test_the_plan_of_two_ranks_is_within_15_percent_of_the_measured_peak():
    saving = {"hidden_size": 512, "checkpointing": True, "chunk_tokens": 1024}
    cases = [{**saving, "zero_stage": stage} for stage in (1, 2, 3)]
    for case in cases:
        result = probe(case, world_size=2)
        assert result["planned"] == pytest.approx(result["measured"], rel=0.15), (case, result)


def test_the_memory_plan_counts_the_queries_that_the_data_plan_serves(encoder):
    # a token budget, groups of 2, and one dataset with groups of 16, which serves fewer queries of more
    # passages
    config = load_config(
        "unified",
        [
            encoder(),
            "engine.template=zero3_8k",
            'data.train=[{"name": "two", "paths": ["x"]},'
            ' {"name": "many", "paths": ["y"], "passages_per_query": 16}]',
            "data.passages_per_query=2",
            "data.batch.buckets=null",
            "data.batch.global_tokens=1000000",
            "data.query_max_tokens=512",
            "data.passage_max_tokens=512",
            "data.length_buckets=[512]",
        ],
    )
    served = {
        (step.queries, step.passages) for group in (2, 16) for step in queries_in_buckets(config.data, group)
    }
    model, strategy = read_model_shape(config), read_strategy(config, 1, on_gpu=True)
    _, step = heaviest_step(config, model, strategy)
    assert served == {(651, 1302), (114, 1824)}
    assert (step.num_queries, step.num_passages) in served
    plans = {
        passages: plan_memory(model, strategy, replace(step, num_queries=queries, num_passages=passages))
        for queries, passages in served
    }
    assert plan_memory(model, strategy, step).total_bytes == max(plan.total_bytes for plan in plans.values())
