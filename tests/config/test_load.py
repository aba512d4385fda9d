"""Recipes and overrides: what wins, what is read as what, and every message that a wrong recipe gives."""

import json
import os
import pickle
from pathlib import Path

import pytest

from megam3.config import recipe_yaml
from megam3.config.load import PATH_FIELDS, dump_config, find_recipe, load_config, parse_config, recipe_names
from megam3.config.schema import RunConfig
from megam3.errors import ConfigError, GroupedConfigError
from tests.recipes import MINIMAL

RECIPE = """\
name: small
model: {path: encoder}
data:
  train:
    - name: a
      paths: [a.jsonl]
    - name: b
      paths: [b.jsonl]
      language: no
  batch: {global_queries: 8}
optim:
  lr: 1e-5
train: {steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, list(overrides))
    return str(caught.value).replace(str(recipe.parent) + "/", "")


def test_defaults_then_recipe_then_overrides(recipe: Path) -> None:
    config = load_config(recipe, ["optim.weight_decay=0.1", "data.train.0.weight=2", "train.seed=7"])
    assert config.optim.lr == 1e-5
    assert isinstance(config.optim.lr, float)
    assert config.optim.weight_decay == 0.1
    assert config.optim.warmup_ratio == 0.1
    assert [dataset.weight for dataset in config.data.train] == [2.0, 1.0]
    assert config.train.seed == 7


def test_the_last_override_wins_and_sections_can_be_created(recipe: Path) -> None:
    config = load_config(
        recipe, ["engine.template=zero2", "engine.template=zero3", "objective.sum_weights.lexical=0.5"]
    )
    assert config.engine.template == "zero3"
    assert config.objective.sum_weights is not None
    assert config.objective.sum_weights.lexical == 0.5


def test_override_values_are_yaml(recipe: Path) -> None:
    config = load_config(
        recipe,
        [
            "optim.clip_norm=null",
            "optim.lr=2e-5",
            "engine.activation_checkpointing=true",
            "optim.betas=[0.9, 0.98]",
        ],
    )
    assert config.optim.clip_norm is None
    assert config.optim.lr == 2e-5
    assert config.engine.activation_checkpointing is True
    assert config.optim.betas == [0.9, 0.98]
    assert (
        load_config(recipe, ["data.train.0.query_instruction=a=b"]).data.train[0].query_instruction == "a=b"
    )


def test_whole_sections_can_be_replaced(recipe: Path) -> None:
    config = load_config(recipe, ["data.batch={buckets: m3_unified}", "train={epochs: 2}"])
    assert config.data.batch.buckets == "m3_unified"
    assert config.data.batch.global_queries is None
    assert config.train.epochs == 2
    assert config.train.steps is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5e+3", -2500.0),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("null", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-5'", "1e-5"),
        ("[1, 2e3]", [1, 2000.0]),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("e5", "e5"),
        ("1e", "1e"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = recipe_yaml.parse_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        "1e-5",
        "no",
        "true",
        "010",
        "null",
        "",
        "1:30",
        "a: b",
        "# x",
        "سلام",
        "- x",
        1e-5,
        1e22,
        3,
        None,
        True,
        [],
        {},
    ],
)
def test_dump_reads_back(value: object) -> None:
    back = recipe_yaml.parse(recipe_yaml.dump({"key": value}), "x").data
    assert back == {"key": value}
    assert isinstance(back, dict)
    assert type(back["key"]) is type(value)


def test_config_round_trip(recipe: Path, tmp_path: Path) -> None:
    config = load_config(
        recipe,
        [
            "data.batch={buckets: [{max_tokens: 8192, global_queries: 4}]}",
            "train.seed=1",
            "objective.sum_weights={}",
        ],
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_open_with_their_launch_line(name: str) -> None:
    assert isinstance(load_config(name), RunConfig)
    head = find_recipe(name).read_text().split("\nname:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "--module megam3.train" in head
    assert "Cost:" in head


def test_unknown_key_names_the_nearest_one_and_the_line(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("language: no", "langauge: no"))
    assert (
        message(recipe)
        == "data.train.1.langauge (small.yaml:9) = 'no': unknown key in data.train.1; did you mean "
        "data.train.1.language?"
    )


def test_unknown_key_in_an_override_quotes_it(recipe: Path) -> None:
    assert message(recipe, "optim.warmup=0.2") == (
        "optim.warmup (override optim.warmup=0.2) = 0.2: unknown key in optim; did you mean "
        "optim.warmup_ratio?"
    )


def test_unknown_key_that_belongs_elsewhere(recipe: Path) -> None:
    assert "unknown key; did you mean optim.lr?" in message(recipe, "lr=1")
    assert "did you mean optim.lr?" in message(recipe, "train.learning_rate=1")
    assert "did you mean data.query_max_tokens?" in message(recipe, "query_max_len=32")
    assert "did you mean data.train.0.language?" in message(recipe, "data.language=de")


def test_unknown_key_without_a_neighbour_lists_the_section(recipe: Path) -> None:
    assert "remove it, or use one of: lr, head_lr, lexical_lr" in message(recipe, "optim.zzz=1")


def test_wrong_type_says_field_value_rule_remedy_and_line(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("steps: 10", "steps: ten"))
    assert message(recipe) == (
        "train.steps (small.yaml:13) = 'ten': must be an integer; write it without quotes or letters in "
        "train.steps"
        " (Optimizer steps; exactly one of `steps` and `epochs`)"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=10.5", "train.steps (override train.steps=10.5) = 10.5: must be an integer"),
        ("train.steps=true", "= True: must be an integer"),
        ("train.steps='10'", "= '10': must be an integer"),
        ("train.steps=0", "= 0: must be greater than 0"),
        ("optim.lr=-1e-5", "= -1e-05: must be greater than 0"),
        ("optim.lr=fast", "= 'fast': must be a number"),
        (
            "optim.lr=null",
            "= None: must be a number; give a value to optim.lr (Peak learning rate of the encoder)",
        ),
        ("engine.activation_offload=1", "= 1: must be a boolean"),
        ("engine.precision=fp8", "= 'fp8': must be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("data.batch.buckets=m3_unifed", "= 'm3_unifed': must be a list or 'm3_contrastive' or 'm3_unified'"),
        ("data.train=[]", "= []: must be right (List should have at least 1 item after validation, not 0)"),
        ("optim=3", "optim (override optim=3) = 3: must be a dictionary"),
        ("name=null", "name (override name=null) = None: must be a string"),
    ],
)
def test_wrong_values(recipe: Path, override: str, expected: str) -> None:
    assert expected in message(recipe, override)


def test_wrong_value_inside_a_union_has_a_clean_path(recipe: Path) -> None:
    text = message(
        recipe,
        "data.batch.buckets=[{max_tokens: 100, global_queries: 2}, {max_tokens: 1.5, global_queries: 2}]",
    )
    assert text.startswith("data.batch.buckets.1.max_tokens (override data.batch.buckets=")
    assert "= 1.5: must be an integer" in text


def test_missing_field_is_named_with_its_meaning_and_section(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("  lr: 1e-5", "  weight_decay: 0.1"))
    assert (
        message(recipe)
        == "optim.lr (small.yaml:11) = None: is required; add optim.lr (Peak learning rate of the encoder)"
    )


def test_all_problems_at_once(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("lr: 1e-5", "lr: fast").replace("steps: 10", "step: 10"))
    with pytest.raises(GroupedConfigError) as caught:
        load_config(recipe)
    assert [problem.what.split(" ")[0] for problem in caught.value.problems] == ["optim.lr", "train.step"]
    text = str(caught.value)
    assert text.startswith("2 problems\n  1. optim.lr (")
    assert "\n  2. train.step (" in text
    assert "did you mean train.steps?" in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_several_bad_overrides_at_once(recipe: Path) -> None:
    text = message(
        recipe, "optim.lr", "data.train.5.weight=2", "name.first=x", "train.steps=[1", "data.train.x.weight=1"
    )
    assert "5 problems" in text
    assert "override = 'optim.lr': is not of the form key=value; write for example optim.lr=2e-5" in text
    assert (
        "data.train (override data.train.5.weight=2) = '5': is a list of 2, and this is no index of it; use "
        "an index: 0 to 1, or 2 to append" in text
    )
    assert (
        "name (override name.first=x) = 'small': is a value, so it has no part 'first'; set name itself, or "
        "remove the rest" in text
    )
    assert "override train.steps = '[1': its value is not valid YAML; quote it" in text
    assert "data.train (override data.train.x.weight=1) = 'x'" in text


def test_key_written_twice(recipe: Path) -> None:
    recipe.write_text(RECIPE + "optim:\n  lr: 1\n")
    assert (
        message(recipe)
        == "optim (small.yaml:14) = 'optim': is written twice, first at small.yaml:11; keep one of the two"
    )


def test_broken_yaml_has_its_line(recipe: Path) -> None:
    recipe.write_text("name: x\nmodel: {path: a\ndata: 3\n")
    text = message(recipe)
    assert text.startswith("small.yaml:3 = 'data: 3': not valid YAML (")
    assert text.endswith("correct this line")
    recipe.write_text("name: x\n\tmodel: 3\n")
    assert message(recipe).startswith("small.yaml:2 = 'model: 3': not valid YAML")
    recipe.write_text("name: !!python/object:os.system x\n")
    assert message(recipe).startswith("small.yaml:1 = ")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n", "word\n"])
def test_a_recipe_is_a_mapping(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    assert "a recipe is a YAML mapping of sections; start it with `name: …`" in message(recipe)


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="no such file, and no packaged recipe has this name; did you mean unified\\? give a path",
    ):
        load_config("unifed")
    with pytest.raises(ConfigError, match="is a folder, not a recipe file"):
        load_config(tmp_path)


def test_unreadable_recipe(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="cannot be read .*give a readable UTF-8 file"):
        load_config(path)


def test_a_float_written_as_integer_is_accepted_and_becomes_one() -> None:
    data = json.loads(json.dumps(MINIMAL))
    data["optim"]["lr"] = 1
    config = parse_config(data)
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)


def test_values_are_safe(recipe: Path) -> None:
    assert "its value is not valid YAML" in message(recipe, "name=!!python/object/apply:os.getcwd []")
    for tag in ("python/object:os.system", "python/name:os.system", "python/module:os", "binary_code"):
        recipe.write_text(f"name: !!{tag} x\n")
        assert message(recipe).startswith(f"small.yaml:1 = 'name: !!{tag} x': not valid YAML (")


def test_aliases_that_multiply_stop_early(recipe: Path) -> None:
    # nine levels of nine aliases each: 9^9 values, gigabytes once written out
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    recipe.write_text("\n".join(bomb) + "\n")
    assert "aliases (*name) repeat more than a recipe can mean; write the values out" in message(recipe)


def test_an_alias_inside_what_it_stands_for_stops(recipe: Path) -> None:
    recipe.write_text("name: &again [*again]\n")
    assert message(recipe).startswith("small.yaml:1 = 'level 41': is nested too deeply for a recipe")


def test_aliases_that_only_repeat_a_value_are_fine(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("[a.jsonl]", "&files [a.jsonl]").replace("[b.jsonl]", "*files"))
    assert [dataset.paths for dataset in load_config(recipe).data.train] == [["a.jsonl"], ["a.jsonl"]]


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_nesting_is_bounded(recipe: Path, opening: str) -> None:
    recipe.write_text("name:\n  " + opening * 20_000)
    assert message(recipe) == "small.yaml:2 = 'level 41': is nested too deeply for a recipe; write it flat"


def test_the_number_of_values_is_bounded(recipe: Path) -> None:
    recipe.write_text("name:\n- x\n" + "- x\n" * 200_000)
    assert "'over 100000 values': are more than any recipe holds; is this file a recipe?" in message(recipe)


def test_a_file_too_large_for_a_recipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"")
    os.truncate(path, 10 << 30)  # sparse: reading it would take 10 GiB
    with pytest.raises(ConfigError, match="has 10737418240 bytes, more than the 1000000 of any recipe"):
        load_config(path)


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x9f"])
def test_control_characters_are_named_with_their_line(recipe: Path, character: str) -> None:
    recipe.write_text(RECIPE.replace("lr: 1e-5", f"lr: 1e-5{character}"), encoding="utf-8")
    code = f"U+{ord(character):04X}"
    assert f"not valid YAML (the control character {code} is not allowed in text)" in message(recipe)
    assert message(recipe).startswith("small.yaml:12 = ")


def test_a_number_of_ten_thousand_digits_is_an_error_of_the_recipe(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("steps: 10", f"steps: {'1' * 10_000}"))
    assert "not valid YAML (Exceeds the limit" in message(recipe)


def test_home_is_expanded_in_paths_and_nowhere_else(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(
        recipe,
        [
            "model.path=~/encoder",
            "data.train.0.paths=[~/a.jsonl, data/~b.jsonl]",
            "data.store_dir=~/store",
            "evaluation.folders=['~']",
            "output_dir='~/runs'",
            "data.train.0.query_instruction='~/x'",
        ],
    )
    assert config.model.path == "/home/someone/encoder"
    assert config.data.train[0].paths == ["/home/someone/a.jsonl", "data/~b.jsonl"]
    assert config.data.store_dir == "/home/someone/store"
    assert config.evaluation.folders == ["/home/someone"]
    assert config.output_dir == "/home/someone/runs"
    assert config.data.train[0].query_instruction == "~/x"


@pytest.mark.parametrize("field", PATH_FIELDS, ids=".".join)
def test_path_fields_are_fields(field: tuple[str, ...]) -> None:
    names = {part for part in field if part != "*"}
    schema = RunConfig.model_json_schema()
    known = set(schema["properties"]).union(*(d.get("properties", {}) for d in schema["$defs"].values()))
    assert names <= known


def test_one_behind_the_last_index_appends(recipe: Path) -> None:
    entry = "data.train.2={name: third, paths: [c.jsonl]}"
    config = load_config(recipe, [entry, "data.train.2.weight=0.5", "evaluation.folders.0=heldout"])
    assert [dataset.name for dataset in config.data.train][2:] == ["third"]
    assert config.data.train[2].weight == 0.5
    assert config.evaluation.folders == ["heldout"]
    config = load_config(recipe, ["data.train.2.name=x", "data.train.2.paths=[~/x.jsonl]"])
    assert config.data.train[2].paths == [os.path.expanduser("~/x.jsonl")]
    assert "data.train.2.paths (override data.train.2.name=x) = None: is required" in message(
        recipe, "data.train.2.name=x"
    )
