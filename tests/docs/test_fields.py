"""The page of all fields holds the schema: each field once per stage, with its description."""

import pytest

from megam3.config.explain import all_fields, sections_at
from megam3.config.reference import reference_page


def field_names() -> list[str]:
    """Of every stage that is known by now; a stage that a test defines is one of them."""
    return sorted({name.replace(".0", "") for name in all_fields()})


FIELDS = field_names()


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    lines = reference_page().splitlines()
    cells = [line.strip("| ").replace("\\|", "¦").split(" | ") for line in lines if line.startswith("| `")]
    return [[name.strip("`").replace(".0", ""), *others] for name, *others in cells]


def test_every_field_of_the_schema_has_a_row_and_no_other_has_one(rows: list[list[str]]) -> None:
    assert len(FIELDS) > 100
    assert sorted({row[0] for row in rows}) == field_names()


@pytest.mark.parametrize("field", FIELDS)
def test_a_row_holds_what_the_schema_says(field: str, rows: list[list[str]]) -> None:
    found = [row for row in rows if row[0] == field]
    parts = tuple(field.split("."))
    sections = [section for section in sections_at(parts[:-1]) if parts[-1] in section.model_fields]
    # `kind` and others stand in several stages, each with a row of its own
    assert len(found) == len(sections)
    for row, section in zip(found, sections):
        description = " ".join((section.model_fields[parts[-1]].description or "").split())
        assert len(row) == 4
        assert row[3] == description.replace("|", "¦") or not description
        assert row[3], "no meaning"


def test_headings_can_be_linked_to() -> None:
    headings = [line for line in reference_page().splitlines() if line.startswith("#")]
    assert len(headings) == len(set(headings))
    assert "## data.train.0" in headings
    assert "## objective (pretrain)" in headings
