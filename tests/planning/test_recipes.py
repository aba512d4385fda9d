"""What the shipped recipes' comments say of their launch, memory and cost, against the plan and the
arithmetic."""

import json
import re

import pytest

from megam3.config.load import RECIPE_DIR, load_config
from megam3.planning.choice import chosen
from megam3.planning.memory import plan_memory
from megam3.planning.memory_report import GIB
from megam3.planning.recipe import heaviest_step, read_model_shape, read_strategy
from megam3.planning.shapes import StepShape
from megam3.planning.strategy import forward_flops
from tests.planning.test_memory_report import BGE_M3

RECIPES = sorted(file.stem for file in RECIPE_DIR.glob("*.yaml"))
ASSUMED_FLOPS = 3e14


@pytest.fixture
def encoder(tmp_path) -> str:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (tmp_path / "config.json").write_text(json.dumps({**BGE_M3, **dropout}))
    return f"model.path={tmp_path}"


def header(recipe: str) -> str:
    """The comment above the first field, as one line a paragraph."""
    lines = (RECIPE_DIR / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return re.sub(r"\s+", " ", " ".join(line[1:].strip() for line in comment))


def test_there_are_recipes_of_every_stage_at_full_and_at_half_size():
    stages = {"pretrain", "contrastive", "unified"}
    assert {*RECIPES} == {*stages, *(f"{stage}_node" for stage in stages), "finetune"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_how_it_is_launched_what_it_holds_and_what_it_costs(recipe, encoder):
    text = header(recipe)
    assert re.search(rf"deepspeed --num_gpus \d+ --module megam3\.train {recipe} model\.path=", text)
    assert "planned, not measured: " in text
    assert "Cost: (counted, not measured) " in text
    config = load_config(recipe, [encoder])
    if config.engine.template == "auto":
        choice = chosen(config, 8, 80 * GIB, on_gpu=True)
        assert choice is not None
        stated = text.split("planned, not measured: ")[1]
        expected = choice.lines[0].removeprefix("engine.template=auto: ").split(";")[0]
        assert stated.startswith(expected)
        assert re.search(rf"sbatch --nodes \d+ slurm/train\.sh {recipe} ", text)
    else:
        model, strategy = read_model_shape(config), read_strategy(config, 1, on_gpu=True)
        peak = plan_memory(model, strategy, heaviest_step(config, model, strategy)[1]).total_bytes
        stated = re.search(r"planned, not measured: ([\d.]+) GiB on one GPU", text)
        assert stated is not None
        assert float(stated[1]) == round(peak / GIB, 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stated_cost_is_tokens_times_operations_at_the_assumed_rate(recipe, encoder):
    sentence = (
        r"([\d.e]+) tokens of ([\d.]+) GFLOP \(.*?\): ([\d.e]+), ([\d.]+) GPU (hours|seconds)"
        r" at an assumed 300 TFLOP/s"
    )
    found = re.search(sentence, header(recipe))
    assert found is not None, header(recipe)
    tokens, gflop, total, time = map(float, found.groups()[:4])
    assert tokens * gflop * 1e9 == pytest.approx(total, rel=0.06)
    assert total / ASSUMED_FLOPS / (3600 if found[5] == "hours" else 1) == pytest.approx(time, rel=0.06)
    config = load_config(recipe, [encoder])
    model = read_model_shape(config)
    # attention apart for short texts: the layers' products; with it where a step's texts are 8192 long
    length = 8192 if config.objective.kind == "pretrain" else 1
    step = StepShape(num_queries=0, num_passages=1, query_tokens=0, passage_tokens=length)
    worth = re.search(r"(\d) forward passes' worth", found[0])
    passes = int(worth[1]) if worth else 3
    assert passes * forward_flops(model, step) / length / 1e9 == pytest.approx(gflop, rel=0.05)
