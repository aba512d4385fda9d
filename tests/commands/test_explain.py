"""`megam3 explain`: what a user reads of a field, from the schema."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megam3
from megam3.cli import main
from megam3.config.explain import all_fields
from megam3.obs.figures import FIGURES, meaning


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["explain", *argv]) == 0
    return capsys.readouterr().out


def test_a_field_is_told_by_type_default_section_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "optim.head_lr") == (
        "optim.head_lr\n"
        "  type     float (> 0) | null\n"
        "  default  null\n"
        "  section  optim: AdamW and its schedule.\n"
        "  Peak learning rate of the heads; None: `lr`.\n"
    )


@pytest.mark.parametrize(
    ("field", "parts"),
    [
        ("optim.lr", ["type     float (> 0)\n", "default  none: required"]),
        ("optim.warmup_ratio", ["type     float (>= 0, <= 1)", "default  0.1"]),
        ("objective.preset", ["type     m3 | m3_v1 | joint", "default  'm3'"]),
        ("data.train.0.weight", ["section  data.train: One training dataset", "Sampling weight: 2.0"]),
        ("data.train", ["type     list of DatasetConfig", "passages_per_query   Overrides"]),
        ("engine", ["Memory strategy and precision.", "activation_offload"]),
        ("objective.kind", ["InfoNCE on three heads", "RetroMAE on documents"]),
    ],
)
def test_types_defaults_lists_and_stages(
    capsys: pytest.CaptureFixture[str], field: str, parts: list[str]
) -> None:
    text = said(capsys, field)
    assert not [part for part in parts if part not in text], text


def test_every_field_of_the_schema_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    fields = list(all_fields())
    assert len(fields) > 100
    for field in fields:
        assert said(capsys, field).startswith(f"{field}\n  type     ")


def test_without_a_field_the_sections_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys).split()[:4] == ["name", "output_dir", "model", "data"]


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("optim.hed_lr", "did you mean optim.head_lr?"),
        ("head_lr", "did you mean optim.head_lr?"),
        ("learning_rate", "did you mean optim.lr?"),
        ("0", "use one of the sections: name, output_dir"),
    ],
)
def test_an_unknown_field_is_told_the_nearest(
    capsys: pytest.CaptureFixture[str], field: str, nearest: str
) -> None:
    assert main(["explain", field]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megam3: error: field = {field!r}: is not in the recipe's schema; ")
    assert nearest in error


def test_it_costs_no_torch() -> None:
    code = "import sys, megam3.commands.explain; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_figure_of_the_log_is_told_by_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "lexical/nonzero_share") == (
        "lexical/nonzero_share  share of token weights above 0 in the batch; 0: the head is dead\n"
    )
    assert "InfoNCE of the dense vector cut" in said(capsys, "loss/dense_256")
    assert "self-distillation" in said(capsys, "loss/distill_dense")
    everything = said(capsys, "figures")
    assert len(everything.splitlines()) == len(FIGURES)
    assert main(["explain", "loss/dens"]) == 2
    assert "figure = 'loss/dens': is not among those that a run logs; did you mean loss/dense?" in (
        capsys.readouterr().err
    )


def test_every_figure_that_the_source_names_has_a_meaning() -> None:
    groups = "|".join(dict.fromkeys(name.partition("/")[0] for name in FIGURES))
    named = {
        name
        for folder in ("objectives", "loss", ".")
        for file in (Path(megam3.__file__).parent / folder).glob("*.py")
        for name in re.findall(rf'f?"((?:{groups})/[^"]+)"', file.read_text(encoding="utf-8"))
    }
    assert len(named) > 15
    assert not [name for name in named if meaning(re.sub(r"{[^}]*}", "dense", name)) is None]


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    (facts,) = json.loads(said(capsys, "--json", "optim.head_lr"))
    assert (facts["type"], facts["default"]) == ("float (> 0) | null", "null")
    assert facts["meaning"] == "Peak learning rate of the heads; None: `lr`."
    assert "weight" in json.loads(said(capsys, "--json", "data.train"))[0]["fields"]
    assert json.loads(said(capsys, "--json", "optim/lr")) == {"optim/lr": FIGURES["optim/lr"]}
    assert json.loads(said(capsys, "--json"))["sections"][:2] == ["name", "output_dir"]
