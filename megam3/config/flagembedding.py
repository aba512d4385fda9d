"""FlagEmbedding's command line for M3 training → the equivalent recipe, and what differs.

    torchrun --nproc_per_node 2 -m FlagEmbedding.finetune.embedder.encoder_only.m3 --learning_rate 1e-5 …

The arguments are those of FlagEmbedding 1.4 (its model, data and training classes) and the older names still
found in
scripts (`--normlized`, `--same_task_within_batch`, `--enable_sub_batch`). Nothing is dropped in silence: an
argument is
mapped, explained, known to have no meaning here, or an error.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megam3.config.flagembedding_arguments import DEFAULTS, Arguments
from megam3.errors import ConfigError

MODULES = ("FlagEmbedding.finetune.embedder.encoder_only.m3", "FlagEmbedding.BGE_M3.run")
_ALIASES = {
    "normlized": "normalize_embeddings",
    "enable_sub_batch": "sub_batch_size",
    "same_task_within_batch": "same_dataset_within_batch",
    "nproc-per-node": "nproc_per_node",
    "train_batch_size": "per_device_train_batch_size",
}
_MAPPED = {
    *DEFAULTS,
    *("model_name_or_path", "train_data", "output_dir", "colbert_dim", "query_instruction_for_retrieval"),
    *("passage_instruction_for_retrieval", "query_instruction_format", "passage_instruction_format"),
    *("knowledge_distillation", "kd_loss_type", "unified_finetuning", "use_self_distill", "deepspeed"),
    *("sub_batch_size", "gradient_checkpointing", "fp16", "bf16", "max_steps", "save_steps", "run_name"),
    *("sentence_pooling_method", "normalize_embeddings", "negatives_cross_device", "warmup_steps"),
    *("fix_encoder", "fix_position_embedding", "save_total_limit", "max_example_num_per_dataset"),
    *("use_mrl", "mrl_dims"),
    *("same_dataset_within_batch", "small_threshold", "drop_threshold"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_num_workers"),
}
_WITHOUT_MEANING = {
    *("config_name", "tokenizer_name", "cache_dir", "trust_remote_code", "use_fast_tokenizer", "token"),
    *("cache_path", "pad_to_multiple_of", "overwrite_output_dir", "dataloader_drop_last", "report_to"),
    *("save_strategy", "logging_dir", "ddp_find_unused_parameters", "remove_unused_columns"),
    *("save_only_model", "optim", "do_train", "ddp_timeout", "save_safetensors", "logging_strategy"),
}
_LAUNCHER = {
    *("master_port", "master_addr", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "standalone"),
    *("nproc_per_node", "nnodes", "num_gpus", "num_nodes", "max_restarts"),
}
_NEGATIVES = "no_in_batch_neg"


@dataclass(frozen=True, kw_only=True)
class Migration:
    """A recipe as plain data, and what a user must know about it."""

    recipe: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def find_command(script: str) -> list[str]:
    """The words of the FlagEmbedding call in a command line or shell script, `VAR=…` lines expanded.

    Raises:
        ConfigError: no such call, quotes that do not close, or a variable nobody sets.
    """
    variables: dict[str, str] = {}
    for line in map(str.strip, script.replace("\\\n", " ").splitlines()):
        assignment = re.match(r"^(?:export\s+)?([A-Za-z_]\w*)=(.*)$", line)
        is_call = any(module in line for module in MODULES)
        try:
            value = shlex.split(assignment[2], comments=True) if assignment else []
            # several words after it: a variable set for one call (CUDA_VISIBLE_DEVICES=0 torchrun …)
            if assignment and len(value) <= 1:
                variables[assignment[1]] = _expand(" ".join(value), variables)
                continue
            words = shlex.split(_expand(line, variables, is_call), comments=True)
        except ConfigError:
            raise
        except ValueError as error:
            if is_call or assignment:
                rule = f"cannot be read ({error})"
                raise ConfigError("command", line[:80], rule, "close the quote") from None
            continue
        # a script may collect everything in a variable and run that: eval $cmd
        if any(module in words for module in MODULES):
            return words
    rule = f"holds no call of {MODULES[0]}"
    raise ConfigError("command", script.strip()[:80], rule, "give the whole line: torchrun … -m …")


def _expand(text: str, variables: Mapping[str, str], is_strict: bool = False) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name in variables:
            return variables[name]
        if is_strict:
            raise ConfigError(
                "command", f"${name}", "is not set in the script", f"write {name}=… above the call"
            )
        return match[0]

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)


def parse_arguments(words: list[str]) -> dict[str, list[str]]:
    """Option → values, old names under their new one, defaults not filled in.

    Raises:
        ConfigError: an option FlagEmbedding does not have.
    """
    known = _MAPPED | _WITHOUT_MEANING | _LAUNCHER
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = _ALIASES.get(name, name.replace("-", "_"))
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "remove it"
            raise ConfigError(
                "command", f"--{name}", "is no argument known of FlagEmbedding's M3 training", hint
            )
        values = found[name] = [value] if equals else []
    return found


def migrate(script: str) -> Migration:
    """The recipe that trains what `script` trains.

    Raises:
        ConfigError: no call, an unknown argument, a missing required one, or a value of the wrong kind.
    """
    arguments = Arguments(parse_arguments(find_command(script)))
    notes = _always(arguments)
    group = arguments.integer("train_group_size")
    output = Path(arguments.text("output_dir") or "runs/m3")
    recipe: dict[str, Any] = {
        "name": output.name,
        "output_dir": str(output.parent),
        "model": _model(arguments),
        "data": {
            "train": _datasets(arguments, notes),
            "batch": _batch(arguments, notes),
            "query_max_tokens": arguments.integer("query_max_len"),
            "passage_max_tokens": arguments.integer("passage_max_len"),
            "passages_per_query": group,
            "segment_shuffle_probability": arguments.number("shuffle_ratio"),
        },
        "objective": _objective(arguments, notes),
        "optim": _optim(arguments, notes),
        "engine": _engine(arguments, notes),
        "train": _train(arguments),
    }
    return Migration(recipe=recipe, notes=notes)


def _model(arguments: Arguments) -> dict[str, Any]:
    path = arguments.text("model_name_or_path")
    if path is None:
        raise ConfigError("command", "--model_name_or_path", "is required and missing", "add it")
    width = arguments.text("colbert_dim")
    narrow = {"multi_vector_dim": int(width)} if width and int(width) > 0 else {}
    pooling = arguments.text("sentence_pooling_method") or "cls"
    chosen: dict[str, Any] = {}
    if pooling != "cls":
        chosen["pooling"] = {"last_token": "last"}.get(pooling, pooling)
    parts = {"fix_encoder": "encoder", "fix_position_embedding": "positions"}
    frozen = [part for name, part in parts.items() if arguments.flag(name)]
    if frozen:
        chosen["freeze"] = frozen
    # FlagEmbedding starts missing heads at random without a word
    return {"path": path, "missing_heads": "init", **narrow, **chosen}


def _datasets(arguments: Arguments, notes: list[str]) -> list[dict[str, Any]]:
    paths = arguments.found.get("train_data") or []
    if not paths:
        raise ConfigError("command", "--train_data", "is required and missing", "add it")
    datasets: list[dict[str, Any]] = []
    for path, is_apart in (each for given in paths for each in _files_apart(given, arguments, notes)):
        stem = Path(path).name.removesuffix(".jsonl").removesuffix(".json") or "data"
        taken = [dataset["name"] for dataset in datasets]
        name = stem if stem not in taken else f"{stem}-{len(datasets)}"
        dataset: dict[str, Any] = {"name": name, "paths": [path]}
        for side in ("query", "passage"):
            instruction = arguments.text(f"{side}_instruction_for_retrieval")
            if instruction:
                form = arguments.text(f"{side}_instruction_format") or "{}{}"
                # megam3 puts one string before the text, so the format must end in it
                before, _, after = form.rpartition("{}")
                if after:
                    notes.append(
                        f"--{side}_instruction_format puts {after!r} behind the text; that is left out."
                    )
                dataset[f"{side}_instruction"] = before.replace("{}", instruction, 1)
        # of files in a folder the folder's name decides there
        marked = Path(path).parent.name if is_apart else stem
        if marked.endswith(_NEGATIVES):
            dataset["in_batch_negatives"] = False
            notes.append(
                f"{stem}: in_batch_negatives: false is now a field instead of the file name's"
                " ending; here it also "
                "holds for the sum and for self-distillation, where FlagEmbedding 1.4 computes"
                " a constant loss."
            )
        datasets.append(dataset)
    return datasets


def _files_apart(path: str, arguments: Arguments, notes: list[str]) -> list[tuple[str, bool]]:
    """(path, whether it is a file of a folder that was named): under --same_dataset_within_batch each file of
    a folder is a dataset there. Without it batches mix all datasets, and so do those of a folder here."""
    named_file = Path(path).suffix and not Path(path).is_dir()
    if named_file or not arguments.flag("same_dataset_within_batch"):
        return [(path, False)]
    files = sorted(str(file) for file in Path(path).glob("*.json*") if file.suffix in (".json", ".jsonl"))
    if not files:
        notes.append(
            f"{path}: one dataset here, since it holds no file on this machine; with"
            " --same_dataset_within_batch each file of a folder is a dataset of its own, and becomes one"
            " where the folder can be read."
        )
        return [(path, False)]
    return [(file, True) for file in files]


def _batch(arguments: Arguments, notes: list[str]) -> dict[str, Any]:
    processes = arguments.text("nproc_per_node") or "1"
    ranks = (int(processes) if processes.isdecimal() else 1) * arguments.integer("nnodes")
    if not processes.isdecimal():
        notes.append(
            f"--nproc_per_node {processes} was counted as 1: multiply data.batch.global_queries by your GPUs."
        )
    per_rank = arguments.integer("per_device_train_batch_size")
    batch: dict[str, Any] = {"global_queries": ranks * per_rank}
    notes.append(
        f"data.batch.global_queries {ranks * per_rank} = {ranks} processes x {per_rank}; it"
        " stays that on any number "
        "of ranks."
    )
    if arguments.integer("gradient_accumulation_steps") > 1:
        batch["accumulation_steps"] = arguments.integer("gradient_accumulation_steps")
    if "sub_batch_size" in arguments.found:
        batch["chunk_tokens"] = 16384
        notes.append(
            "--sub_batch_size became data.batch.chunk_tokens (tokens, not texts); the gradients"
            " are exact, and it "
            "also works with unified fine-tuning."
        )
    return batch


def _objective(arguments: Arguments, notes: list[str]) -> dict[str, Any]:
    objective: dict[str, Any] = {"kind": "unified", "temperature": arguments.number("temperature")}
    if not arguments.flag("unified_finetuning"):
        # without a second head there is no sum to learn or to teach from
        objective |= {"heads": ["dense"], "preset": "joint", "self_distill": False}
        notes.append("--unified_finetuning is off, so only the dense head is trained: objective.heads.")
    else:
        objective["self_distill"] = arguments.flag("use_self_distill")
        start = arguments.integer("self_distill_start_step")
        objective["self_distill_start_step"] = max(0, start)
        if start > 0:
            notes.append(
                "self_distill_start_step counts optimizer steps and is resumed; theirs counts micro-batches."
            )
    if arguments.flag("use_mrl"):
        dims = arguments.integers("mrl_dims")
        if not dims:
            remedy = "write --mrl_dims 64 128 256, or remove --use_mrl"
            raise ConfigError("command", "--use_mrl", "says nothing without --mrl_dims", remedy)
        objective["matryoshka_dims"] = sorted(set(dims))
    if arguments.flag("knowledge_distillation"):
        objective["teacher"] = arguments.text("kd_loss_type") or "kl_div"
    return objective


def _optim(arguments: Arguments, notes: list[str]) -> dict[str, Any]:
    optim: dict[str, Any] = {
        "lr": arguments.number("learning_rate"),
        "weight_decay": arguments.number("weight_decay"),
        "clip_norm": arguments.number("max_grad_norm") or None,
    }
    kind = arguments.text("lr_scheduler_type") or "linear"
    shapes = {
        "linear": "linear",
        "cosine": "cosine",
        "constant": "constant",
        "constant_with_warmup": "constant",
    }
    optim["schedule"] = shapes.get(kind, "linear")
    if kind not in shapes:
        notes.append(f"--lr_scheduler_type {kind} has no counterpart; linear is used.")
    if "adam_beta1" in arguments.found or "adam_beta2" in arguments.found:
        first, second = arguments.text("adam_beta1") or "0.9", arguments.text("adam_beta2") or "0.999"
        optim["betas"] = [float(first), float(second)]
    if "adam_epsilon" in arguments.found:
        optim["eps"] = arguments.number("adam_epsilon")
    optim["warmup_ratio"] = _warmup_ratio(arguments, kind, notes)
    return optim


def _warmup_ratio(arguments: Arguments, schedule: str, notes: list[str]) -> float:
    """transformers' own rules: `constant` has no warm-up, and steps above 0 go before the ratio."""
    if schedule == "constant":
        return 0.0
    warmup = arguments.number("warmup_steps") if "warmup_steps" in arguments.found else 0.0
    if warmup <= 0:
        return arguments.number("warmup_ratio")
    steps = arguments.number("max_steps") if "max_steps" in arguments.found else 0.0
    if steps > 0:
        return min(1.0, warmup / steps)
    notes.append("--warmup_steps needs the number of steps; set optim.warmup_ratio to their quotient.")
    return arguments.number("warmup_ratio")


def _engine(arguments: Arguments, notes: list[str]) -> dict[str, Any]:
    stage = re.search(r"stage_?([0-3])", arguments.text("deepspeed") or "")
    template = f"zero{stage[1]}" if stage else "zero0"
    if arguments.text("deepspeed") and not stage:
        notes.append(
            "the stage of the --deepspeed file is not in its name; engine.template is zero0: check it."
        )
    precision = "bf16" if arguments.flag("bf16") else "auto"
    if arguments.flag("fp16"):
        notes.append(
            "--fp16 became engine.precision auto: bf16 on GPUs (no loss scaling), fp32 on CPUs; cards without"
            " bf16 take engine.precision=fp16 and a template from zero1 on."
        )
    checkpointing = arguments.flag("gradient_checkpointing")
    return {"template": template, "precision": precision, "activation_checkpointing": checkpointing}


def _train(arguments: Arguments) -> dict[str, Any]:
    train: dict[str, Any] = {"seed": arguments.integer("seed")}
    if arguments.text("max_steps") and arguments.integer("max_steps") > 0:
        train["steps"] = arguments.integer("max_steps")
    else:
        train["epochs"] = arguments.number("num_train_epochs")
    train["log_every_steps"] = max(1, arguments.integer("logging_steps"))
    # below 1 transformers means a share of all steps, which are not known here
    if arguments.text("save_steps") and arguments.number("save_steps") >= 1:
        train["save_every_steps"] = arguments.integer("save_steps")
    if arguments.text("save_total_limit"):
        train["keep_checkpoints"] = arguments.integer("save_total_limit")
    return train


def _always(arguments: Arguments) -> list[str]:
    notes = [
        "negatives come from all ranks for every head, with the exact gradient; FlagEmbedding's"
        " dense loss alone "
        "crosses ranks, and its gradient there is 1/ranks of the true one.",
        "batches share dataset and length bucket; padding neither costs anything nor changes a MaxSim score.",
    ]
    if not arguments.flag("negatives_cross_device"):
        notes.append("--negatives_cross_device is off there and cannot be turned off here.")
    if not arguments.text("query_instruction_for_retrieval"):
        notes.append(
            "no query instruction: with --same_dataset_within_batch FlagEmbedding 1.4 writes"
            " the word None before "
            "each query; here nothing is put there."
        )
    if arguments.flag("use_mrl"):
        notes.append(
            "--use_mrl became objective.matryoshka_dims; the loss of the full width is trained beside them."
        )
    if not arguments.flag("normalize_embeddings", default=True):
        notes.append("--normalize_embeddings False: dense vectors are always normalised here.")
    for name in ("max_example_num_per_dataset", "small_threshold", "drop_threshold"):
        if (arguments.text(name) or "0") not in ("0", "None", "100000000"):
            notes.append(f"--{name}: has no counterpart; all records are used.")
    return notes
