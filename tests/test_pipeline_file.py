"""Pipeline files: what is read, and each message about a wrong one."""

from pathlib import Path

import pytest

from megam3.config.load import load_config
from megam3.errors import ConfigError
from megam3.pipeline_file import REFERENCE, Pipeline, read_pipeline
from tests.launches import ROOT

TWO = """\
folder: chain
inputs: {pairs: pairs.jsonl}
stages:
  - {name: mine, command: mine, arguments: "{inputs.pairs} --model m --output {output} --work 'a b'"}
  - {name: learn, command: train, arguments: "recipe.yaml 'data.train.0.paths=[{mine.output}]'"}
"""


def read(folder: Path, text: str) -> Pipeline:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return read_pipeline(path)


def test_arguments_are_split_as_in_a_shell_and_references_found(tmp_path: Path) -> None:
    pipeline = read(tmp_path, TWO)
    mine, learn = pipeline.stages
    assert mine.arguments[-2:] == ("--work", "a b")
    assert mine.input_names == ["pairs"]
    assert [found[0] for found in learn.references] == ["{mine.output}"]
    assert learn.arguments == ("recipe.yaml", "data.train.0.paths=[{mine.output}]")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{mine.output}", "{mined.output}", "refers to a stage that is not there; use one of: mine"),
        ("{mine.output}", "{learn.output}", "refers to this stage or a later one; move that stage before"),
        ("--model m", "--model {learn.checkpoint}", "refers to this stage or a later one; move that stage"),
        ("{mine.output}", "{mine.checkpoint}", "is no output of mine; use output, or checkpoint of a train"),
        (
            "{mine.output}",
            "{inputs.pears}",
            "refers to nothing; use {output}, {STAGE.output} or an input: pairs",
        ),
        ("{mine.output}", "{pairs}", "refers to nothing"),
        (
            "{mine.output}",
            "{output}",
            "the run folder of a train stage is given by the pipeline; leave it out",
        ),
        ("recipe.yaml", "recipe.yaml name=x", "the run folder of a train stage is given by the pipeline"),
        (
            "--output {output}",
            "--output x",
            "has no {output}, where the stage must write; add --output {output}",
        ),
        ("command: train", "command: trian", "'trian': is no command of a stage; did you mean train?"),
        ("command: train", "command: rm", "is no command of a stage; use one of: extend-positions, import,"),
        ("name: learn", "name: mine", "names two stages; give each a name of its own"),
        ("name: learn", "name: ../up", "must be letters, digits, - and _"),
        ("'a b'", "'a b", "No closing quotation; close the quotes"),
        ("name: learn, ", "", "name = None: is required; write `name: …`"),
        ("name: learn", "nmae: learn", "is no key here; use one of: name, command, arguments"),
        ("folder: chain", "", "folder = None: is required"),
        ("{pairs: pairs.jsonl}", "[pairs.jsonl]", "must be names with a path each"),
        (
            "\"recipe.yaml 'data.train.0.paths=[{mine.output}]'\"",
            "[a, b]",
            "must be text, as after the command",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TWO
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, TWO.replace(old, new, 1))
    assert message in str(caught.value)


def test_no_stages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a list of stages"):
        read(tmp_path, "folder: chain\nstages: []\n")


@pytest.mark.parametrize(
    ("file", "commands"),
    [
        ("pipeline", "mine train export mine train export evaluate"),
        (
            "chain",
            "evaluate extend-positions train export train export mine add-teacher-scores "
            "train export evaluate",
        ),
    ],
)
def test_the_examples_are_valid_files_whose_recipes_load(file: str, commands: str) -> None:
    pipeline = read_pipeline(ROOT / "examples" / "pipeline" / f"{file}.yaml")
    assert [stage.command for stage in pipeline.stages] == commands.split()
    for stage in pipeline.stages:
        if stage.command == "train":
            words = [REFERENCE.sub("somewhere", word) for word in stage.arguments]
            config = load_config(words[0].replace("examples", str(ROOT / "examples")), words[1:])
            assert config.data.train[0].paths == ["somewhere"]
            assert config.model.path == "somewhere"
