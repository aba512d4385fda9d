"""What an error says, that it survives a trip between processes, and how several become one."""

import pickle

import pytest

from megam3.errors import ConfigError, DataError, GroupedConfigError, UserError, raise_all

FIRST = ConfigError("optim.lr", -1, "must be positive", "set optim.lr, e.g. 1e-5")
SECOND = ConfigError("train.steps", None, "is required", "add train.steps")


def test_a_message_has_field_value_rule_and_remedy() -> None:
    assert str(DataError("a.jsonl:3", "{", "is not JSON", "correct the line")) == (
        "a.jsonl:3 = '{': is not JSON; correct the line"
    )


@pytest.mark.parametrize("error", [FIRST, GroupedConfigError([FIRST, SECOND])])
def test_errors_survive_pickling(error: UserError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert (again.what, again.value, again.rule, again.remedy) == (
        "optim.lr",
        -1,
        "must be positive",
        "set optim.lr, e.g. 1e-5",
    )


def test_no_problem_raises_nothing_and_a_single_one_is_raised_as_it_is() -> None:
    raise_all([])
    with pytest.raises(ConfigError) as caught:
        raise_all([FIRST])
    assert caught.value is FIRST


def test_several_problems_are_numbered_in_one_error() -> None:
    with pytest.raises(GroupedConfigError) as caught:
        raise_all(iter([FIRST, SECOND]))
    assert str(caught.value) == (
        "2 problems\n"
        "  1. optim.lr = -1: must be positive; set optim.lr, e.g. 1e-5\n"
        "  2. train.steps = None: is required; add train.steps"
    )
