"""The log of a resumed run says which settings changed since the checkpoint."""

from megam3.config.difference import recipe_changes
from tests.recipes import make_config


def test_equal_recipes_have_nothing_to_say() -> None:
    recipe = make_config().model_dump(mode="json")
    assert recipe_changes(recipe, recipe) == []


def test_each_changed_field_is_named_with_both_values() -> None:
    was = make_config(optim__lr=1e-4, optim__betas=[0.9, 0.999]).model_dump(mode="json")
    now = make_config(optim__lr=1e-4, optim__betas=[0.9, 0.98], optim__eps=1e-6).model_dump(mode="json")
    assert recipe_changes(was, now) == [
        "optim.betas: [0.9, 0.999] -> [0.9, 0.98]",
        "optim.eps: 1e-08 -> 1e-06",
    ]


def test_items_of_lists_of_sections_are_compared_one_by_one() -> None:
    was = {"data": {"train": [{"name": "a", "weight": 1.0}]}}
    now = {"data": {"train": [{"name": "a", "weight": 2.0}, {"name": "b"}]}}
    assert recipe_changes(was, now) == [
        "data.train.0.weight: 1.0 -> 2.0",
        "data.train.1.name: (absent) -> 'b'",
    ]


def test_fields_of_one_side_only_are_absent_on_the_other() -> None:
    assert recipe_changes({"a": 1, "gone": {"x": None}}, {"a": 1, "new": []}) == [
        "new: (absent) -> []",
        "gone.x: None -> (absent)",
    ]
