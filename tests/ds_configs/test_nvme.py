"""Optimizer states on a disk: a run under `zero3_nvme`, its checkpoints, and its messages."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megam3.checkpoint import consolidated_weights
from megam3.config.deepspeed import build_deepspeed_config
from megam3.engine.consolidate import MOMENTS, WEIGHT, SavedStates
from megam3.engine.swapped import check_disk
from megam3.errors import ConfigError
from tests.compiled_operators import compile_operator, needs_compiler
from tests.factory import make_tiny_model_folder
from tests.launches import Workplace, launch, make_workplace
from tests.recipes import make_config

TEMPLATE = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3_nvme.json"


@pytest.fixture(scope="module")
def extensions() -> str:
    """DeepSpeed's async_io."""
    folder = compile_operator("AsyncIOBuilder")
    if folder is None:
        pytest.skip("DeepSpeed's async_io needs libaio's headers (Debian: libaio-dev)")
    return folder


class Runs:
    """Runs of four steps on two ranks, with a checkpoint after two."""

    def __init__(self, place: Workplace, extensions: str):
        self.place, self.extensions = place, extensions
        self.disk = place.folder / "disk"
        template = json.loads(TEMPLATE.read_text())
        zero = template["zero_optimization"]
        zero["offload_optimizer"]["nvme_path"] = str(self.disk)
        # two sub-groups, both large enough for a file; what is smaller stays in memory
        zero["sub_group_size"] = 600_000
        (place.folder / "nvme.json").write_text(json.dumps(template))
        self.templates = {"nvme": str(place.folder / "nvme.json"), "zero3": "zero3"}

    def train(self, name: str, template: str) -> None:
        """From the start, or from what is in the run's folder."""
        process = launch(
            self.place.recipe,
            f"name={name}",
            f"model.path={self.place.folder / 'wide'}",
            f"engine.template={self.templates[template]}",
            "train.save_every_steps=2",
            "train.keep_checkpoints=2",
            TORCH_EXTENSIONS_DIR=self.extensions,
            DS_ACCELERATOR="cpu",
        )
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said[-3000:]

    def continue_from_the_middle(self, name: str, source: str, template: str) -> None:
        """The last two steps once more."""
        shutil.copytree(self.place.run(source), self.place.run(name))
        shutil.rmtree(self.place.run(name) / "checkpoints" / "step-000004")
        self.train(name, template)

    def states(self, name: str) -> dict[tuple[str, str], torch.Tensor]:
        """Weights and moments after the last step."""
        saved = SavedStates(str(self.place.run(name) / "checkpoints" / "step-000004"))
        assert saved.adam_steps == 4
        return {(each, kind): saved.read(each, kind) for each in saved.names for kind in (WEIGHT, *MOMENTS)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, extensions: str) -> Runs:
    place = make_workplace(tmp_path_factory.mktemp("nvme"))
    make_tiny_model_folder(place.folder / "wide", hidden_size=256, num_layers=4, num_heads=4)
    made = Runs(place, extensions)
    made.train("whole", "nvme")
    made.train("memory", "zero3")
    return made


@needs_compiler
@pytest.mark.slow
def test_states_lie_on_the_disk_and_the_losses_are_those_of_states_in_memory(runs: Runs) -> None:
    files = {path.name.split("-")[0]: path.stat().st_size for path in runs.disk.rglob("*.swp")}
    assert {"exp_avg", "exp_avg_sq"} < set(files)
    assert min(files.values()) > 1 << 20
    losses = [[row["loss/total"] for row in runs.place.rows(name)] for name in ("whole", "memory")]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@needs_compiler
@pytest.mark.slow
def test_a_resumed_run_ends_with_every_bit_of_the_unbroken_one(runs: Runs) -> None:
    runs.continue_from_the_middle("resumed", "whole", "nvme")
    ours, whole = runs.states("resumed"), runs.states("whole")
    assert set(ours) == set(whole)
    assert any(values.any() for (_, kind), values in whole.items() if kind == "exp_avg")
    for key, values in whole.items():
        assert torch.equal(ours[key], values), key


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("source", "template"), [("whole", "zero3"), ("memory", "nvme")])
def test_a_checkpoint_goes_from_the_disk_to_memory_and_back(runs: Runs, source: str, template: str) -> None:
    name = f"{source}-{template}"
    runs.continue_from_the_middle(name, source, template)
    # the fourth step's loss is that of weights which the third one moved by the moments
    losses = [[row["loss/total"] for row in runs.place.rows(each)] for each in (name, "whole")]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@needs_compiler
@pytest.mark.slow
def test_an_export_finds_the_weights(runs: Runs) -> None:
    weights = consolidated_weights(str(runs.place.run("whole") / "checkpoints" / "step-000004"))
    for (name, kind), values in runs.states("whole").items():
        if kind == WEIGHT:
            assert torch.equal(weights[name], values)


def _template(tmp_path: Path, **changes: object) -> str:
    template = json.loads(TEMPLATE.read_text())
    for key, value in changes.items():
        section, _, field = key.partition("__")
        template["zero_optimization"].setdefault(section, {})[field] = value
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(template))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"offload_param__device": "nvme"},
            "offload_param.device = 'nvme': checkpoints do not find weights on a disk; use cpu: one layer's",
        ),
        (
            {"offload_optimizer__nvme_path": None},
            "offload_optimizer.nvme_path = None: is needed with device nvme; name a folder on a local disk",
        ),
        (
            {"offload_optimizer__pipeline_write": True},
            "pipeline_write = True: a checkpoint could be written before the disk has everything; remove it",
        ),
        (
            {"offload_optimizer__pipeline_read": True},
            "pipeline_read = True: a checkpoint could be written before the disk has everything; remove it",
        ),
    ],
)
def test_what_a_checkpoint_would_not_find_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_deepspeed_config(make_config(engine__template=_template(tmp_path, **changes)), 2)
    assert message in str(caught.value)


def test_each_run_has_a_folder_of_its_own_on_the_disk(tmp_path: Path) -> None:
    def folder(**changes: object) -> str:
        final = build_deepspeed_config(make_config(engine__template="zero3_nvme", **changes), 2)
        return final["zero_optimization"]["offload_optimizer"]["nvme_path"]

    first = folder(name="first", output_dir=str(tmp_path))
    assert first.startswith("/tmp/megam3-nvme/first-")
    assert folder(name="first", output_dir=str(tmp_path)) == first
    assert folder(name="first", output_dir=str(tmp_path / "elsewhere")) != first


def test_a_disk_that_cannot_be_used_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ds_config = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    offloaded = ds_config["zero_optimization"]["offload_optimizer"]
    offloaded["nvme_path"] = str(tmp_path / "file" / "below")
    with pytest.raises(ConfigError) as caught:
        check_disk(ds_config, "mine", lambda: None)
    assert str(caught.value) == (
        f"engine.template = mine: offload_optimizer.nvme_path = '{tmp_path}/file/below': cannot be made"
        " (Not a directory); name a folder on a local disk"
    )
    offloaded["nvme_path"] = str(tmp_path / "disk")

    def load() -> None:
        raise RuntimeError("Unable to JIT load the async_io op\nand more")

    with pytest.raises(ConfigError) as caught:
        check_disk(ds_config, "mine", load)
    assert str(caught.value) == (
        "engine.template = 'mine': DeepSpeed's async_io, which keeps optimizer states on a disk, cannot be"
        " built here (Unable to JIT load the async_io op); install libaio-dev, g++ and ninja, or use"
        " zero3_offload"
    )
    check_disk({"zero_optimization": {"stage": 3}}, "zero3", load)
