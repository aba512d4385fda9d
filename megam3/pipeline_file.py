"""The YAML of `megam3 pipeline`, read and checked before anything runs; `megam3.pipeline` shows one."""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megam3.config import recipe_yaml
from megam3.errors import ConfigError

COMMANDS = (
    "extend-positions",
    "import",
    "train",
    "mine",
    "add-teacher-scores",
    "merge",
    "export",
    "evaluate",
)
"""Those that make something that a later stage reads."""

REFERENCE = re.compile(r"\{(?P<owner>[A-Za-z0-9_-]+)(?:\.(?P<output>[A-Za-z0-9_-]+))?\}")
"""`{output}`, `{inputs.NAME}`, `{STAGE.output}`, `{STAGE.checkpoint}`; `{a: 1}` of an override is none."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Stage:
    """One call of `megam3`, with references still in its arguments."""

    name: str
    command: str
    arguments: tuple[str, ...]

    @property
    def references(self) -> list[re.Match[str]]:
        """All references in the arguments, in their order."""
        return [found for argument in self.arguments for found in REFERENCE.finditer(argument)]

    @property
    def input_names(self) -> list[str]:
        """X of each `{inputs.X}`."""
        return [str(found["output"]) for found in self.references if found["owner"] == "inputs"]


@dataclass(frozen=True)
class Pipeline:
    """A checked file: every reference names an input or an earlier stage that has such an output."""

    folder: Path
    inputs: dict[str, str]
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """The stage of that name, which there is."""
        return next(stage for stage in self.stages if stage.name == name)


def read_pipeline(path: str | Path) -> Pipeline:
    """Read and check a pipeline file.

    Raises:
        ConfigError: invalid YAML, a missing or unknown key, an unknown command, a name used twice, a
            reference to nothing or to a later stage, a stage without `{output}`.
    """
    document = recipe_yaml.read(path)
    data = _mapping(str(path), document.data, required=("folder", "stages"), optional=("inputs",))
    if not isinstance(data["stages"], list) or not data["stages"]:
        raise ConfigError("stages", data["stages"], "must be a list of stages", "write `- name: …` below it")
    inputs = data.get("inputs") or {}
    if not isinstance(inputs, dict) or not all(isinstance(value, str) for value in inputs.values()):
        raise ConfigError("inputs", inputs, "must be names with a path each", "write `pairs: data.jsonl`")
    stages: list[Stage] = []
    names = [each.get("name") for each in data["stages"] if isinstance(each, dict)]
    for number, entry in enumerate(data["stages"]):
        where = document.where.get(("stages", number), f"stages.{number}")
        stage = _stage(where, entry)
        if stage.name in [earlier.name for earlier in stages]:
            raise ConfigError(where, stage.name, "names two stages", "give each a name of its own")
        _check_references(stage, inputs, stages, names)
        stages.append(stage)
    expanded = {str(name): str(Path(value).expanduser()) for name, value in inputs.items()}
    return Pipeline(Path(str(data["folder"])).expanduser(), expanded, tuple(stages))


def _mapping(
    where: str, value: object, required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, Any]:
    keys = ", ".join(required + optional)
    if not isinstance(value, dict):
        raise ConfigError(where, value, "must be a mapping", f"write the keys {keys}")
    for key in value:
        if key not in required + optional:
            raise ConfigError(where, key, "is no key here", f"use one of: {keys}")
    for key in required:
        if value.get(key) is None:
            raise ConfigError(f"{where}, {key}", None, "is required", f"write `{key}: …`")
    return value


def _stage(where: str, entry: object) -> Stage:
    fields = _mapping(where, entry, required=("name", "command", "arguments"), optional=())
    name, command, given = str(fields["name"]), fields["command"], fields["arguments"]
    if not NAME.fullmatch(name) or name in ("inputs", "output"):
        rule = "must be letters, digits, - and _, and neither `inputs` nor `output`"
        raise ConfigError(f"{where}, name", name, rule, "rename the stage")
    if command not in COMMANDS:
        near = difflib.get_close_matches(str(command), COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"use one of: {', '.join(COMMANDS)}"
        raise ConfigError(f"{where}, command", command, "is no command of a stage", remedy)
    if not isinstance(given, str):
        rule, remedy = "must be text, as after the command in a shell", "put it between quotes"
        raise ConfigError(f"{where}, arguments", given, rule, remedy)
    try:
        arguments = tuple(shlex.split(given))
    except ValueError as error:
        raise ConfigError(f"{where}, arguments", given, str(error), "close the quotes") from None
    return Stage(name, command, arguments)


def _check_references(stage: Stage, inputs: dict, earlier: list[Stage], names: list) -> None:
    where, commands = f"stage {stage.name}", {each.name: each.command for each in earlier}
    for found in stage.references:
        owner, output, text = found["owner"], found["output"], found[0]
        if owner == "inputs" or output is None:
            known = {"inputs": inputs, "output": ("",)}.get(owner, ())
            if (output or "") not in known:
                remedy = (
                    f"use {{output}}, {{STAGE.output}} or an input: {', '.join(inputs) or 'there is none'}"
                )
                raise ConfigError(where, text, "refers to nothing", remedy)
        elif owner not in commands:
            later = owner in names
            rule = "refers to this stage or a later one" if later else "refers to a stage that is not there"
            remedy = "move that stage before this one" if later else f"use one of: {', '.join(commands)}"
            raise ConfigError(where, text, rule, remedy)
        elif output != "output" and (output, commands[owner]) != ("checkpoint", "train"):
            rule = f"is no output of {commands[owner]}"
            raise ConfigError(where, text, rule, "use output, or checkpoint of a train stage")
    owns = any(found[0] == "{output}" for found in stage.references)
    if stage.command == "train":
        taken = [word for word in stage.arguments if word.startswith(("output_dir=", "name="))]
        if owns or taken:
            rule = "the run folder of a train stage is given by the pipeline"
            raise ConfigError(where, taken or "{output}", rule, "leave it out; refer to it as {STAGE.output}")
    elif not owns:
        rule = "has no {output}, where the stage must write"
        raise ConfigError(where, " ".join(stage.arguments), rule, _OUTPUT_REMEDY[stage.command])


_OUTPUT_REMEDY = {
    "mine": "add --output {output}",
    "evaluate": "add --out {output}",
} | dict.fromkeys(("extend-positions", "import", "add-teacher-scores", "merge", "export"), "give it as OUT")
