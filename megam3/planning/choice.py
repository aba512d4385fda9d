"""`engine.template: auto`: the fastest memory strategy that fits, put into the recipe before anything starts.

    recipe (auto) + ranks + memory of a GPU  →  the same recipe with template, checkpointing, offload,
      + longest text of its store               gradient_reduction and chunk_tokens written out, and why

A choice is a pure function of these four, so `megam3 show-config`, `megam3 plan-memory` and the run agree.
On CPUs nothing is planned: their memory is the host's, shared with everything else.
"""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass
from typing import Any

from megam3.config.schema import RunConfig
from megam3.data.lengths import LongestTexts
from megam3.errors import ConfigError
from megam3.planning.memory_report import GIB, lengths_line
from megam3.planning.recipe import read_model_shape, steps_of, strategies
from megam3.planning.remedy import smallest_changes
from megam3.planning.strategy import Candidate, candidates

AUTO = "auto"
CHOICE_FILE = "engine_choice.json"
"""In the run folder: what was chosen, its prediction, and the next faster setting, which does not fit."""
TRIED = ("zero0", "zero1", "zero2", "zero3", "zero3_8k", "zero3_offload")
"""Templates that are tried; zero3_offload last, where states do not fit the GPUs at all."""

RESERVE_GIB = 2.0
"""Left to CUDA, NCCL and fragmentation."""
MARGIN = 0.05
"""Besides, this share of the rest: plans of small models lay within 15 % of what was measured, most of them
within 5 %, and a run that was planned too tightly dies hours later."""

CPU_CHUNK_TOKENS = 65536
"""Gradient cache on CPUs where the recipe gives no chunk: 0.5 GiB a layer of XLM-R's width in fp32."""

WORTH_TELLING = 0.1
"""Forward-units below which two predictions are called equally fast: the assumed rates tell no finer."""

SMI_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `auto` became."""

    config: RunConfig
    """The recipe with the choice written out."""
    lines: tuple[str, ...]
    """For the log."""
    record: dict[str, Any]
    """For RUN/engine_choice.json."""


def is_auto(config: RunConfig) -> bool:
    """Whether there is anything to choose."""
    return config.engine.template == AUTO


def chosen(
    config: RunConfig,
    world_size: int,
    memory_bytes: int | None,
    *,
    on_gpu: bool,
    longest: LongestTexts | None = None,
) -> Choice | None:
    """The choice for `world_size` ranks; None where the recipe names a template itself.

    Args:
        memory_bytes: of the smallest visible GPU; None: `engine.gpu_memory_gib` says it.
        longest: texts of the store; None: as long as the recipe allows.

    Raises:
        ConfigError: settings beside `auto` that it decides, memory that nobody knows, or nothing that fits.
    """
    if not is_auto(config):
        return None
    _refuse_settings_beside(config)
    if not on_gpu:
        return _on_cpu(config, world_size, longest)
    limit_bytes = _limit_bytes(config, memory_bytes)
    every = candidates(
        read_model_shape(config),
        strategies(config, TRIED, world_size, on_gpu=True),
        [step for _, step in steps_of(config, world_size, longest)],
        chunk_tokens=config.data.batch.chunk_tokens,
    )
    best = next((candidate for candidate in every if candidate.peak_bytes <= limit_bytes), None)
    if best is None:
        raise _nothing_fits(config, every, limit_bytes, world_size, longest)
    faster = [each for each in every if each.cost < best.cost - WORTH_TELLING]
    nearest = min(faster, key=lambda candidate: candidate.peak_bytes, default=None)
    return _choice(config, world_size, best, nearest, limit_bytes, longest)


def _limit_bytes(config: RunConfig, memory_bytes: int | None) -> int:
    """What a plan may hold of a GPU."""
    if memory_bytes is None:
        if config.engine.gpu_memory_gib is None:
            rule = "plans for the memory of a GPU; none is visible here, and engine.gpu_memory_gib is not set"
            remedy = "set engine.gpu_memory_gib (80 for an H100 or A100), or name a template"
            raise ConfigError("engine.template", AUTO, rule, remedy)
        memory_bytes = int(config.engine.gpu_memory_gib * GIB)
    return int((memory_bytes - RESERVE_GIB * GIB) * (1 - MARGIN))


def apply(config: RunConfig, fields: dict[str, Any]) -> RunConfig:
    """The recipe with the choice's `fields` in it."""
    engine = {name: value for name, value in fields.items() if name != "chunk_tokens"}
    batch = config.data.batch.model_copy(update={"chunk_tokens": fields["chunk_tokens"]})
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update=engine),
            "data": config.data.model_copy(update={"batch": batch}),
        }
    )


def visible_gpu_bytes() -> int | None:
    """Memory of the smallest GPU of this machine as its driver tells it; None: no driver, or no GPU.

    For commands that do without torch.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_TIMEOUT_SECONDS, check=True
        )
        return min(int(line) for line in done.stdout.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _refuse_settings_beside(config: RunConfig) -> None:
    engine = config.engine
    for name, default in (
        ("activation_checkpointing", False),
        ("activation_offload", False),
        ("gradient_reduction", "auto"),
    ):
        if getattr(engine, name) != default:
            rule = "is decided by engine.template=auto"
            remedy = "remove it, or name a template (megam3 plan-memory lists those that fit)"
            raise ConfigError(f"engine.{name}", getattr(engine, name), rule, remedy)


def _on_cpu(config: RunConfig, world_size: int, longest: LongestTexts | None) -> Choice:
    """Nothing is cut for one rank; several share states at the stage that sums and cuts gradients."""
    template = "zero0" if world_size == 1 else "zero2"
    chunk = config.data.batch.chunk_tokens
    most = max(step.num_tokens for _, step in steps_of(config, world_size, longest))
    if chunk is None and most > CPU_CHUNK_TOKENS:
        chunk = CPU_CHUNK_TOKENS
    fields = _fields(template, False, False, "every_pass", chunk)
    line = f"engine.template=auto: {template} on {world_size} CPU rank(s); memory is planned for GPUs only"
    return Choice(config=apply(config, fields), lines=(line,), record={"fields": fields, "reason": line})


def _fields(
    template: str, checkpointing: bool, offload: bool, reduction: str, chunk_tokens: int | None
) -> dict[str, Any]:
    return {
        "template": template,
        "activation_checkpointing": checkpointing,
        "activation_offload": offload,
        "gradient_reduction": reduction,
        "chunk_tokens": chunk_tokens,
    }


def _choice(
    config: RunConfig,
    world_size: int,
    best: Candidate,
    faster: Candidate | None,
    limit_bytes: int,
    longest: LongestTexts | None,
) -> Choice:
    strategy = best.setting.strategy
    reduction = "once" if strategy.reduces_once else "every_pass"
    fields = _fields(
        best.setting.template,
        strategy.checkpointing,
        strategy.activation_offload,
        reduction,
        best.setting.chunk_tokens,
    )
    limit = f"{limit_bytes / GIB:.1f} GiB a rank on {world_size} ranks"
    lines = [f"engine.template=auto: {summary(best)}; may hold {limit}"]
    if faster is None:
        lines.append("no setting is faster by a tenth of a forward pass")
    else:
        lines.append(f"what is faster does not fit; the least of it: {summary(faster)}")
    lines.append(lengths_line(config, longest))
    return Choice(
        config=apply(config, fields),
        lines=tuple(lines),
        record={
            "fields": fields,
            "world_size": world_size,
            "limit_bytes": limit_bytes,
            "longest_text_tokens": None if longest is None else longest.text_tokens,
            "chosen": _figures(best),
            "next_faster": None if faster is None else _figures(faster),
        },
    )


def summary(candidate: Candidate) -> str:
    """Fields, predicted memory and predicted cost in one line.

    The recipes' comments quote it; a test reads them.
    """
    return (
        f"{candidate.setting.fields()} ({candidate.peak_bytes / GIB:.1f} GiB,"
        f" {candidate.cost:.2f} forward-units)"
    )


def _figures(candidate: Candidate) -> dict[str, Any]:
    return {
        "setting": candidate.setting.fields(),
        "planned_bytes": candidate.peak_bytes,
        "compute_units": candidate.compute_units,
        "exposed_units": round(candidate.exposed_units, 3),
    }


def _nothing_fits(
    config: RunConfig,
    every: list[Candidate],
    limit_bytes: int,
    world_size: int,
    longest: LongestTexts | None,
) -> ConfigError:
    least = min(every, key=lambda candidate: candidate.peak_bytes)
    rule = (
        f"no setting fits {limit_bytes / GIB:.1f} GiB a rank on {world_size} ranks; the least is"
        f" {least.peak_bytes / GIB:.1f} GiB, by {least.setting.fields()}"
    )
    changes = smallest_changes(config, TRIED, world_size, limit_bytes, longest)
    given, needed = (
        config.data.batch.chunk_tokens,
        max(each.longest_tokens for _, each in steps_of(config, 1)),
    )
    if given is not None and given > needed:
        changes.insert(0, "data.batch.chunk_tokens=null, which lets smaller chunks be chosen")
    # the limit is less than the card: see RESERVE_GIB and MARGIN
    card = least.peak_bytes / GIB / (1 - MARGIN) + RESERVE_GIB
    changes.append(f"GPUs of {math.ceil(card)} GiB")
    remedy = f"the smallest changes that would do, each by itself: {'; '.join(changes)}"
    if longest is None:
        remedy += "; or run `megam3 prepare` first, if texts are shorter than the recipe allows"
    return ConfigError("engine.template", AUTO, rule, remedy)
