"""`megam3 inspect-batch` shows what a run was really given: the plan, less what the run has gone round."""

import re

import pytest

from megam3.checkpoint.rollbacks import Rollback, add_rollback
from megam3.commands.inspect_batch import main
from megam3.config.load import load_config
from megam3.data.dataset import open_training_data
from megam3.data.tokenizer import load_tokenizer
from megam3.errors import CheckpointError
from tests.launches import make_workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("inspect"))


@pytest.fixture(scope="module")
def data(place):
    config = load_config(place.recipe, [])
    tokenizer = load_tokenizer(config.model.path)
    return open_training_data(config.data, tokenizer, config.store_dir, config.train.seed)


def shown_rows(capsys, place, name, *options):
    assert main([place.recipe, f"name={name}", *map(str, options)]) == 0
    said = capsys.readouterr().out
    return [int(row) for row in re.findall(r"^row (\d+) from ", said, re.MULTILINE)], said


def test_a_step_is_that_of_the_plan_where_nothing_was_left_out(place, data, capsys):
    rows, said = shown_rows(capsys, place, "plain", "--step", 4)
    assert sorted(rows) == sorted(data.plan.batch(4).rows.tolist())
    assert "left out" not in said


def test_ranges_that_the_run_went_round_are_left_out(place, data, capsys):
    folder = place.run("back")
    (folder / "checkpoints").mkdir(parents=True)
    note = {"failed_step": 5, "what": "gradient norm", "back_to": 3, "first": 3, "stop": 5}
    add_rollback(str(folder), Rollback(**note, data_fingerprint=data.fingerprint))
    add_rollback(str(folder), Rollback(**{**note, "first": 0, "stop": 9}, data_fingerprint="other data"))
    rows, said = shown_rows(capsys, place, "back", "--step", 4)
    assert sorted(rows) == sorted(data.plan.batch(6).rows.tolist())
    assert "steps 4 to 5 of the plan are left out: the run has gone round them\n" in said
    assert "steps 1 to" not in said
    # what was left out can be looked at as well
    rows, said = shown_rows(capsys, place, "back", "--step", 4, "--plan")
    assert sorted(rows) == sorted(data.plan.batch(4).rows.tolist())


def test_a_damaged_record_of_them_is_no_empty_one(place):
    folder = place.run("damaged") / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "rollbacks.json").write_text("[{")
    with pytest.raises(CheckpointError, match="rollbacks = .*cannot be read"):
        main([place.recipe, "name=damaged", "--step", "4"])
