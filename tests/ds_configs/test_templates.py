"""Every memory strategy trains on two ranks as far as its parts exist on a CPU, and computes the same."""

import json
from pathlib import Path

import pytest

from megam3.config.deepspeed import build_deepspeed_config
from tests.launches import Workplace, make_workplace, train_calls
from tests.ranks import run_ranks
from tests.recipes import make_config

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
ON_CPU = ("zero0", "zero1", "zero2", "zero3", "zero3_8k", "zero3_offload")


def test_each_template_is_explained() -> None:
    text = (FOLDER / "README.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_each_template_makes_a_dictionary_for_eight_ranks(name: str) -> None:
    made = build_deepspeed_config(make_config(engine__template=name), 8, has_gpu=True)
    assert made["zero_optimization"]["stage"] in (0, 1, 2, 3)
    assert made["train_batch_size"] == 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("templates"))


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    """Two steps under each template, one after another on two ranks."""
    within_node = json.loads((FOLDER / "zeropp_multinode.json").read_text())
    # groups of two instead of eight, without the CUDA kernels that quantise
    within_node["zero_optimization"] |= {
        "zero_hpz_partition_size": 2,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
    }
    path = place.folder / "zeropp.json"
    path.write_text(json.dumps(within_node))
    templates = {**{name: name for name in ON_CPU}, "zeropp": str(path)}
    made = [
        {
            "name": name,
            "arguments": [place.recipe, f"name={name}", f"engine.template={template}", "train.steps=2"],
        }
        for name, template in templates.items()
    ]
    return run_ranks(train_calls, 2, made)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*ON_CPU, "zeropp"])
def test_each_template_trains_saves_and_computes_the_same(
    place: Workplace, calls: dict[str, dict], name: str
) -> None:
    assert calls[name]["code"] == 0, calls[name]["said"]
    assert (place.run(name) / "checkpoints" / "latest").read_text() == "step-000002"
    losses = [[row["loss/total"] for row in place.rows(run)] for run in (name, "zero0")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
