"""pydantic's validation errors as ConfigErrors: field, value, rule, remedy, and where it was written."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megam3.config.objective import ObjectiveConfig, objective_kinds
from megam3.config.recipe_yaml import Path, dotted
from megam3.config.schema import RunConfig
from megam3.errors import ConfigError

# what users of other trainers write first; values are megam3's fields
FOREIGN_NAMES = {
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "data.batch.global_queries",
    "train_batch_size": "data.batch.global_queries",
    "batch_size": "data.batch.global_queries",
    "gradient_accumulation_steps": "data.batch.accumulation_steps",
    "sub_batch_size": "data.batch.chunk_tokens",
    "model_name_or_path": "model.path",
    "colbert_dim": "model.multi_vector_dim",
    "train_data": "data.train",
    "train_group_size": "data.passages_per_query",
    "query_max_len": "data.query_max_tokens",
    "passage_max_len": "data.passage_max_tokens",
    "shuffle_ratio": "data.segment_shuffle_probability",
    "use_self_distill": "objective.self_distill",
    "kd_loss_type": "objective.teacher",
    "max_grad_norm": "optim.clip_norm",
    "gradient_clipping": "optim.clip_norm",
    "lr_scheduler_type": "optim.schedule",
    "gradient_checkpointing": "engine.activation_checkpointing",
    "deepspeed": "engine.template",
    "save_steps": "train.save_every_steps",
    "logging_steps": "train.log_every_steps",
    "eval_steps": "train.evaluate_every_steps",
}


def explain(error: ValidationError, data: Any, where: dict[Path, str]) -> list[ConfigError]:
    """One ConfigError per wrong field, in the order of the recipe's schema.

    A union reports one violation per member; those of one field are joined with `or`.
    """
    by_path: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_path.setdefault(_path_in(data, detail), []).append(detail)
    deepest = [
        path for path in by_path if not any(other != path and other[: len(path)] == path for other in by_path)
    ]
    return [_explain_one(path, by_path[path], where) for path in deepest]


def _path_in(data: Any, detail: ErrorDetails) -> Path:
    """The location without the union tags that pydantic puts between a field and its content."""
    path: list[str | int] = []
    node: Any = data
    last = len(detail["loc"]) - 1
    for position, part in enumerate(detail["loc"]):
        children = dict(enumerate(node)) if isinstance(node, list) else node
        if isinstance(children, dict) and part in children:
            path.append(part)
            node = children[part]
        elif position == last and detail["type"] == "missing":
            path.append(part)
    return tuple(path)


def _explain_one(path: Path, details: list[ErrorDetails], where: dict[Path, str]) -> ConfigError:
    field = dotted(path)
    place = _written_at(path, where)
    what = f"{field} ({place})" if place else field
    kinds = {detail["type"] for detail in details}
    value = details[0]["input"]
    if "extra_forbidden" in kinds:
        section = dotted(path[:-1])
        return ConfigError(what, value, f"unknown key{f' in {section}' if section else ''}", _nearest(path))
    about = _description(path)
    meaning = f" ({about.rstrip('.')})" if about else ""
    if "missing" in kinds:
        return ConfigError(what, None, "is required", f"add {field}{meaning}")
    rule = " or ".join(dict.fromkeys(_rule(detail) for detail in details))
    return ConfigError(what, value, f"must be {rule}", f"{_how_to_write(kinds, value)}{field}{meaning}")


def _rule(detail: ErrorDetails) -> str:
    message = detail["msg"]
    for prefix in ("Input should be ", "Value should be "):
        if message.startswith(prefix):
            return (
                message.removeprefix(prefix)
                .replace("a valid integer", "an integer")
                .replace("a valid ", "a ")
            )
    return f"right ({message})"


def _how_to_write(kinds: set[str], value: Any) -> str:
    if isinstance(value, str) and kinds & {"int_type", "float_type", "bool_type"}:
        return "write it without quotes or letters in "
    if value is None:
        return "give a value to "
    return "change "


def _written_at(path: Path, where: dict[Path, str]) -> str:
    for length in range(len(path), -1, -1):
        if path[:length] in where:
            return where[path[:length]]
    return ""


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections named anywhere in a type: itself, in a list, in a union."""
    if annotation is ObjectiveConfig:
        yield from objective_kinds().values()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def sections_at(path: Path) -> list[type[BaseModel]]:
    """Sections that a path leads to: one, none, or one per stage below `objective`."""
    sections: list[type[BaseModel]] = [RunConfig]
    for part in path:
        if isinstance(part, str):
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [model for field in fields for model in models_in(field.annotation)]
    return sections


def _description(path: Path) -> str:
    # the docstring below the field in schema.py; an index belongs to the list above it
    names = [part for part in path if isinstance(part, str)]
    for section in sections_at(tuple(names[:-1])) if names else []:
        field = section.model_fields.get(names[-1])
        if field is not None and field.description:
            # its first sentence, whichever way the lines are broken
            return " ".join(field.description.split()).split(". ")[0]
    return ""


def all_fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every field of the schema, as in an override; below a list with index 0."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        is_list = getattr(field.annotation, "__origin__", None) is list
        for model in models_in(field.annotation):
            yield from all_fields(model, f"{prefix}{name}.{'0.' if is_list else ''}")


def _nearest(path: Path) -> str:
    """The remedy for an unknown key: the nearest name here, the same name elsewhere, or all names here."""
    name, prefix = str(path[-1]), dotted(path[:-1])
    names = [field for section in sections_at(path[:-1]) for field in section.model_fields]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}.{near[0]}?" if prefix else f"did you mean {near[0]}?"
    elsewhere = FOREIGN_NAMES.get(name) or next(
        (field for field in all_fields() if field.rsplit(".", 1)[-1] == name), None
    )
    if elsewhere:
        return f"did you mean {elsewhere}?"
    return f"remove it, or use one of: {', '.join(dict.fromkeys(names))}"
