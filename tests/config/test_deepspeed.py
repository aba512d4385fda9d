"""Templates and the final dictionary, checked against DeepSpeed's own configuration models."""

import json
from pathlib import Path
from typing import Any

import pytest

from megam3.config.deepspeed import (
    bf16_sums_warning,
    build_deepspeed_config,
    default_template_dir,
    find_template,
    resolve_precision,
)
from megam3.errors import ConfigError
from tests.recipes import make_config

TEMPLATES = sorted(path.stem for path in default_template_dir().glob("*.json"))
STAGES = {
    "zero0": 0,
    "zero1": 1,
    "zero2": 2,
    "zero3": 3,
    "zero3_nvme": 3,
    "zero3_offload": 3,
    "zero3_8k": 3,
    "zeropp_multinode": 3,
}


def build(template: str, world_size: int = 8, **changes: Any) -> dict[str, Any]:
    return build_deepspeed_config(make_config(engine__template=template, **changes), world_size)


def message(tmp_path: Path, template: dict[str, Any] | str, world_size: int = 1) -> str:
    path = tmp_path / "mine.json"
    path.write_text(template if isinstance(template, str) else json.dumps(template))
    with pytest.raises(ConfigError) as caught:
        build(str(path), world_size)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_the_templates_there_are() -> None:
    assert set(TEMPLATES) == set(STAGES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_final_dictionary(name: str) -> None:
    config = build(name, optim__clip_norm=2.5, engine__precision="bf16")
    assert config["zero_optimization"]["stage"] == STAGES[name]
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 2.5
    assert config["bf16"] == {"enabled": True}
    assert config.get("data_types") == ({"grad_accum_dtype": "fp32"} if STAGES[name] >= 2 else None)
    assert "optimizer" not in config
    assert "scheduler" not in config


@pytest.mark.parametrize("name", TEMPLATES)
def test_deepspeed_knows_every_key(name: str) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = build(name)["zero_optimization"]
    accepted = {field for field in DeepSpeedZeroConfig.model_fields}
    accepted |= {info.alias for info in DeepSpeedZeroConfig.model_fields.values() if info.alias}
    assert set(zero) <= accepted
    parsed = DeepSpeedZeroConfig(**zero)
    for key, value in zero.items():
        if not isinstance(value, dict):
            field = key if key in DeepSpeedZeroConfig.model_fields else key.removeprefix("stage3_")
            assert getattr(parsed, field) == value


def test_the_precision_in_which_gradients_are_sent() -> None:
    assert "communication_data_type" not in build("zero2")
    assert build("zero2", engine__gradient_dtype="fp32")["communication_data_type"] == "fp32"


def test_the_precision_is_given_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}))
    with pytest.raises(
        ConfigError, match=r"communication_data_type = 'bf16': given in two places.*remove one"
    ):
        build(str(path), engine__gradient_dtype="fp32")


def test_one_reduction_at_stage_3_is_for_fp32() -> None:
    assert build("zero3", engine__gradient_reduction="once")
    message = (
        r"engine.gradient_reduction = 'once': would sum .* in bf16 at ZeRO stage 3; use engine.template=zero2"
    )
    with pytest.raises(ConfigError, match=message):
        build("zero3", engine__gradient_reduction="once", engine__precision="bf16")


def test_layers_are_compiled_below_stage_3() -> None:
    for template in ("zero0", "zero1", "zero2"):
        assert build(template, engine__compile_layers=True)
    message = r"engine.compile_layers = True: ZeRO stage 3 gathers .* use engine.template=zero2, or set"
    with pytest.raises(ConfigError, match=message):
        build("zero3", engine__compile_layers=True)


def test_clipping_off() -> None:
    assert build("zero1", optim__clip_norm=None)["gradient_clipping"] == 0.0


def test_precision() -> None:
    assert resolve_precision("auto", has_gpu=True) == "bf16"
    assert resolve_precision("auto", has_gpu=False) == "fp32"
    assert resolve_precision("fp32", has_gpu=True) == "fp32"
    assert build_deepspeed_config(make_config(), 1)["bf16"] == {"enabled": False}
    assert build_deepspeed_config(make_config(), 1, has_gpu=True)["bf16"] == {"enabled": True}


def test_sums_of_gradients_in_bf16_are_warned_of() -> None:
    def warning(template: str, **changes: Any) -> str | None:
        config = make_config(**{"engine__template": template, "engine__precision": "bf16", **changes})
        return bf16_sums_warning(config, build_deepspeed_config(config, 8))

    assert warning("zero1", data__batch__chunk_tokens=8192) == (
        "engine.template = zero1: below ZeRO stage 2 DeepSpeed sums the gradients of a step in bf16, and "
        "data.batch.chunk_tokens makes"
        " many of them; use zero2 or zero3, which sum in fp32, or engine.precision=fp32"
    )
    assert "data.batch.accumulation_steps makes" in str(warning("zero1", data__batch__accumulation_steps=4))
    assert warning("zero1") is None
    assert warning("zero2", data__batch__chunk_tokens=8192) is None
    assert warning("zero1", data__batch__chunk_tokens=8192, engine__precision="fp32") is None


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("train_batch_size", 64, "data.batch"),
        ("gradient_clipping", 1.0, "optim.clip_norm"),
        ("bf16", {"enabled": True}, "engine.precision"),
        ("fp16", {"enabled": True}, "engine.precision"),
        ("data_types", {"grad_accum_dtype": "bf16"}, "engine.precision"),
        ("optimizer", {"type": "AdamW"}, "optim"),
        ("scheduler", {"type": "WarmupLR"}, "optim.schedule"),
        ("activation_checkpointing", {}, "engine.activation_checkpointing"),
    ],
)
def test_a_field_given_in_both_places_names_both(tmp_path: Path, key: str, value: object, field: str) -> None:
    assert message(tmp_path, {"zero_optimization": {"stage": 1}, key: value}) == (
        f"mine.json:{key} = {value!r}: given in two places: here and by the recipe's {field}; "
        f"remove it from the template and set {field} in the recipe"
    )


def test_a_field_that_is_no_memory_strategy(tmp_path: Path) -> None:
    assert message(tmp_path, {"zero_optimisation": {"stage": 1}}) == (
        "mine.json:zero_optimisation = {'stage': 1}: is no memory strategy; did you mean zero_optimization?"
    )
    assert "remove it; a template may hold: aio, " in message(tmp_path, {"tensorboard": {}})


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ({}, "zero_optimization = None"),
        ({"zero_optimization": 2}, "zero_optimization = 2"),
        ({"zero_optimization": {}}, "zero_optimization.stage = None"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage = 'two'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage = True"),
    ],
)
def test_a_template_says_its_stage(tmp_path: Path, template: dict[str, Any], place: str) -> None:
    assert message(tmp_path, template) == (
        f'mine.json:{place}: a template says its ZeRO stage: 0, 1, 2 or 3; write {{"zero_optimization": '
        f'{{"stage": 1}}}}'
    )


def test_auto_values(tmp_path: Path) -> None:
    assert message(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}) == (
        "mine.json:zero_optimization.reduce_bucket_size = 'auto': DeepSpeed needs a value here; "
        "write a number, or remove the key for DeepSpeed's default"
    )


def test_hierarchical_partition_divides_the_ranks() -> None:
    with pytest.raises(
        ConfigError, match="12 ranks cannot be split into groups of 8; set it to the GPUs of one node"
    ):
        build("zeropp_multinode", 12)
    assert build("zeropp_multinode", 16)


def test_unknown_template_lists_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        build("zero_3")
    assert str(caught.value) == (
        "engine.template = 'zero_3': no such file, and no template has this name; "
        "did you mean zero3? give a path or one of: zero0, zero1, zero2, zero3, zero3_8k, zero3_nvme, "
        "zero3_offload, zeropp_multinode"
    )


def test_no_templates_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(no templates in "):
        find_template("zero1", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{\n "zero_optimization": \n}',
            "mine.json:3 = 'Expecting value': is not valid JSON; correct this line",
        ),
        ("[]", "mine.json = 'list': a template is a JSON object"),
        (
            '{"zero_optimization": {"stage": 1, "stage": 2}}',
            "mine.json:stage = 2: is written twice; keep one of the two",
        ),
    ],
)
def test_broken_template(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(tmp_path, text)


def test_unreadable_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read; give a readable UTF-8 file"):
        build(str(path))


def test_own_folder_of_templates(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}, "wall_clock_breakdown": true}')
    config = build_deepspeed_config(make_config(engine__template="mine"), 2, tmp_path)
    assert config["zero_optimization"] == {"stage": 2}
    assert config["wall_clock_breakdown"] is True
