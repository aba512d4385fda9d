"""The final DeepSpeed dictionary: a memory strategy from ds_configs/ plus what the recipe says about the run.

A template holds memory strategy only, so that one file serves every recipe and every recipe runs under every
strategy. megam3 counts its own batches and sets accumulation boundaries itself, hence the batch sizes of one;
optimizer and schedule are torch objects.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megam3.config.schema import RunConfig
from megam3.errors import ConfigError, raise_all
from megam3.files import parse_json

RECIPE_FIELDS = {
    "train_batch_size": "data.batch",
    "train_micro_batch_size_per_gpu": "data.batch",
    "gradient_accumulation_steps": "data.batch.accumulation_steps",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "steps_per_print": "train.log_every_steps",
    "seed": "train.seed",
}
"""DeepSpeed fields that the recipe decides, and where."""

MEMORY_FIELDS = frozenset(
    {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "aio",
        "communication_data_type",
    }
)
"""DeepSpeed fields that make up a memory strategy."""

NO_TIMERS = {"throughput": {"enabled": False}}
"""DeepSpeed's own count of samples a second makes the host wait for the device at every forward pass from the
third step on, each chunk of the gradient cache twice; `megam3.obs.clock` counts without."""

DIAGNOSTIC_FIELDS = frozenset(
    {"comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state"}
)
"""DeepSpeed fields that change what is printed, not what is computed."""

FP32_SUMS_FROM_STAGE = 2
"""ZeRO stage from which the gradients of several backward passes are summed in fp32 under bf16. DeepSpeed's
own default is the model's precision, in which a sum of equal terms stops growing at the 256th; stages 0 and 1
know nothing else."""

Precision = Literal["bf16", "fp16", "fp32"]

FP16 = {
    "enabled": True,
    "loss_scale": 0.0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 1,
    "min_loss_scale": 1.0,
}
"""Loss scaling: dynamic (0) from 2^16, halved at every overflow, doubled after 1000 steps without one (arXiv
1710.03740, section 3.2). DeepSpeed's defaults, but for its hysteresis of 2: that lets the first overflow pass
without halving, and skips one step more."""


def default_template_dir() -> Path:
    """`ds_configs`: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def resolve_precision(precision: Literal["auto", "bf16", "fp16", "fp32"], has_gpu: bool) -> Precision:
    """`auto` is bf16 on GPUs and fp32 on CPUs."""
    if precision == "auto":
        return "bf16" if has_gpu else "fp32"
    return precision


def build_deepspeed_config(
    config: RunConfig, world_size: int, template_dir: str | Path | None = None, *, has_gpu: bool = False
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, from the template `config.engine.template` and the recipe.

    Raises:
        ConfigError: unknown template, invalid JSON, a field that the recipe decides, or one that is no memory
            strategy.
    """
    path = find_template(
        config.engine.template, default_template_dir() if template_dir is None else Path(template_dir)
    )
    template = read_template(path)
    raise_all(
        [
            *_foreign_fields(template, path),
            *_auto_values(template, path),
            *_partition_size(template, path, world_size),
        ]
    )
    stage = _zero_stage(template, path)
    raise_all(_disk_problems(template, path))
    precision = resolve_precision(config.engine.precision, has_gpu)
    _refuse_clashes(config, template, path, stage, precision)
    sums_in_fp32 = stage >= FP32_SUMS_FROM_STAGE and precision != "fp32"
    communication = config.engine.gradient_dtype
    return {
        **_with_own_disk_folder(template, config),
        **({} if communication == "auto" else {"communication_data_type": communication}),
        **({"data_types": {"grad_accum_dtype": "fp32"}} if sums_in_fp32 else {}),
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        "timers": NO_TIMERS,
        "bf16": {"enabled": precision == "bf16"},
        **({"fp16": FP16} if precision == "fp16" else {}),
    }


def _with_own_disk_folder(template: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The template with a folder of this run's own where optimizer states are kept on a disk: two runs of a
    node would overwrite each other's."""
    zero = template["zero_optimization"]
    offloaded = zero.get("offload_optimizer") or {}
    if offloaded.get("device") != "nvme":
        return template
    run = hashlib.sha256(os.path.abspath(config.run_dir).encode()).hexdigest()[:12]
    path = os.path.join(offloaded["nvme_path"], f"{config.name}-{run}")
    return {**template, "zero_optimization": {**zero, "offload_optimizer": {**offloaded, "nvme_path": path}}}


def _disk_problems(template: dict[str, Any], path: Path) -> list[ConfigError]:
    """What DeepSpeed can keep on a disk and a checkpoint of megam3 would not find."""
    zero, found = template["zero_optimization"], []
    offloaded = zero.get("offload_optimizer") or {}
    where = f"{path}:zero_optimization"
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        rule = "checkpoints do not find weights on a disk"
        remedy = "use cpu: one layer's weights at a time are on the GPU all the same"
        found.append(ConfigError(f"{where}.offload_param.device", "nvme", rule, remedy))
    if offloaded.get("device") != "nvme":
        return found
    folder = offloaded.get("nvme_path")
    if not isinstance(folder, str):
        rule = "is needed with device nvme"
        remedy = "name a folder on a local disk of every node"
        found.append(ConfigError(f"{where}.offload_optimizer.nvme_path", folder, rule, remedy))
    for key in ("pipeline_read", "pipeline_write"):
        if offloaded.get(key):
            rule = "a checkpoint could be written before the disk has everything"
            found.append(ConfigError(f"{where}.offload_optimizer.{key}", True, rule, "remove it"))
    return found


def _refuse_clashes(
    config: RunConfig, template: dict[str, Any], path: Path, stage: int, precision: Precision
) -> None:
    """Settings of the engine section that do not go with the template.

    Raises:
        ConfigError: the first that does not.
    """
    if precision == "fp16" and stage == 0:
        rule = f"{config.engine.template} is ZeRO stage 0, whose fp16 DeepSpeed keeps apart from ZeRO's"
        raise ConfigError("engine.precision", "fp16", rule, "use engine.template: zero1, zero2 or zero3")
    if config.engine.gradient_reduction == "once" and stage == 3 and precision != "fp32":
        rule = f"would sum the gradients of all passes in {precision} at ZeRO stage 3"
        remedy = "use engine.template=zero2, which sums them in fp32, or every_pass"
        raise ConfigError("engine.gradient_reduction", "once", rule, remedy)
    if config.engine.compile_layers and stage == 3:
        rule = (
            "ZeRO stage 3 gathers each layer's weights in hooks, at which a compiled layer would break apart"
        )
        remedy = "use engine.template=zero2, or set engine.compile_layers=false"
        raise ConfigError("engine.compile_layers", True, rule, remedy)
    offloaded = template["zero_optimization"].get("offload_optimizer") or {}
    if config.engine.adamw == "deepspeed_cpu" and offloaded.get("device") != "cpu":
        rule = f"works in host memory, and {config.engine.template} keeps the optimizer's states elsewhere"
        remedy = "use a template with offload_optimizer (zero3_offload), or engine.adamw=auto"
        raise ConfigError("engine.adamw", "deepspeed_cpu", rule, remedy)
    if config.engine.gradient_dtype != "auto" and "communication_data_type" in template:
        rule = "given in two places: here and by the recipe's engine.gradient_dtype"
        remedy = "remove one of them"
        raise ConfigError(
            f"{path}:communication_data_type", template["communication_data_type"], rule, remedy
        )


def is_half(final: dict[str, Any]) -> bool:
    """Whether weights and activations take two bytes: bf16 or fp16."""
    return bool(final["bf16"]["enabled"] or final.get("fp16", {}).get("enabled"))


def bf16_sums_warning(config: RunConfig, final: dict[str, Any]) -> str | None:
    """What to say of a run that sums the gradients of several backward passes in bf16; None of any other."""
    batch = config.data.batch
    has_sums = batch.chunk_tokens is not None or batch.accumulation_steps > 1
    if not has_sums or not is_half(final) or "data_types" in final:
        return None
    template, field = (
        config.engine.template,
        "chunk_tokens" if batch.chunk_tokens is not None else "accumulation_steps",
    )
    return (
        f"engine.template = {template}: below ZeRO stage {FP32_SUMS_FROM_STAGE} DeepSpeed sums"
        f" the gradients of a step in {'bf16' if final['bf16']['enabled'] else 'fp16'}, and"
        f" data.batch.{field} makes many of them; use zero2 or zero3, which sum in fp32, or"
        " engine.precision=fp32"
    )


def find_template(name: str, template_dir: Path) -> Path:
    """The file of a template given by name or as a path.

    Raises:
        ConfigError: neither; lists the templates there are.
    """
    by_name = template_dir / f"{name}.json"
    if by_name.parent == template_dir and by_name.is_file():
        return by_name
    if Path(name).is_file():
        return Path(name)
    names = sorted(path.stem for path in template_dir.glob("*.json"))
    near = difflib.get_close_matches(Path(name).stem, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    remedy = f"{hint}give a path or one of: {', '.join(names) or f'(no templates in {template_dir})'}"
    raise ConfigError("engine.template", name, "no such file, and no template has this name", remedy)


def read_template(path: Path) -> dict[str, Any]:
    """The JSON object of a template.

    Raises:
        ConfigError: unreadable, invalid JSON (with its line), a key written twice, or not an object.
    """
    try:
        template = parse_json(
            path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _without_repeats(pairs, path)
        )
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}", error.msg, "is not valid JSON", "correct this line"
        ) from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), str(error), "cannot be read", "give a readable UTF-8 file") from None
    if not isinstance(template, dict):
        raise ConfigError(
            str(path),
            type(template).__name__,
            "a template is a JSON object",
            'write {"zero_optimization": {"stage": 1}}',
        )
    return template


def _without_repeats(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ConfigError(f"{path}:{key}", value, "is written twice", "keep one of the two")
        seen[key] = value
    return seen


def _foreign_fields(template: dict[str, Any], path: Path) -> Iterator[ConfigError]:
    for key, value in template.items():
        if key in RECIPE_FIELDS:
            field = RECIPE_FIELDS[key]
            rule = f"given in two places: here and by the recipe's {field}"
            yield ConfigError(
                f"{path}:{key}", value, rule, f"remove it from the template and set {field} in the recipe"
            )
        elif key not in MEMORY_FIELDS | DIAGNOSTIC_FIELDS:
            known = sorted(MEMORY_FIELDS | DIAGNOSTIC_FIELDS)
            near = difflib.get_close_matches(key, known, n=1)
            remedy = (
                f"did you mean {near[0]}?" if near else f"remove it; a template may hold: {', '.join(known)}"
            )
            yield ConfigError(f"{path}:{key}", value, "is no memory strategy", remedy)


def _auto_values(node: Any, path: Path, key: str = "") -> Iterator[ConfigError]:
    # transformers' Trainer fills "auto" in before DeepSpeed sees it; DeepSpeed alone fails on it much later,
    # without naming the file
    if node == "auto":
        yield ConfigError(
            f"{path}:{key}",
            node,
            "DeepSpeed needs a value here",
            "write a number, or remove the key for DeepSpeed's default",
        )
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _auto_values(value, path, f"{key}.{name}" if key else name)


def _zero_stage(template: dict[str, Any], path: Path) -> int:
    zero = template.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        name, value = (
            ("zero_optimization.stage", stage) if isinstance(zero, dict) else ("zero_optimization", zero)
        )
        raise ConfigError(
            f"{path}:{name}",
            value,
            "a template says its ZeRO stage: 0, 1, 2 or 3",
            'write {"zero_optimization": {"stage": 1}}',
        )
    return stage


def _partition_size(template: dict[str, Any], path: Path, world_size: int) -> Iterator[ConfigError]:
    zero = template.get("zero_optimization")
    size = zero.get("zero_hpz_partition_size", 1) if isinstance(zero, dict) else 1
    if isinstance(size, int) and size > 1 and world_size % size:
        rule = f"{world_size} ranks cannot be split into groups of {size}"
        remedy = "set it to the GPUs of one node, and start as many ranks on every node"
        yield ConfigError(f"{path}:zero_optimization.zero_hpz_partition_size", size, rule, remedy)
