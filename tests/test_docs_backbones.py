"""docs/backbones.md says what megam3/encoders.py knows."""

import re
from pathlib import Path

from megam3.encoders import FAMILIES, served_families, window_reaches
from megam3.reading import POOLINGS
from tests.model.test_attention import tiny

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "backbones.md").read_text(encoding="utf-8")


def rows(header):
    lines = PAGE.split(header, 1)[1].splitlines()[2:]
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_families_is_the_one_in_the_code():
    found = rows("| `model_type` |")
    assert [row[0].strip("`") for row in found] == sorted(served_families())
    for name, _, positions, direction, plan in found:
        family = FAMILIES[name.strip("`")]
        has_windows = any(window_reaches({**tiny(name.strip("`")).to_dict(), "model_type": name.strip("`")}))
        kind = "rotary" if family.is_rotary else "table"
        assert positions == kind + (", windows" if has_windows else ""), name
        assert direction == ("causal or both" if family.direction_field else "both"), name
        assert plan == ("yes" if family.is_counted else "–"), name
    refused = {name for name, family in FAMILIES.items() if not family.runs_packed}
    assert refused == set(re.findall(r"`([\w-]+)`", PAGE.split("Refused by name:", 1)[1].split("(", 1)[0]))


def test_the_table_of_poolings_is_the_one_in_the_code():
    assert sorted(row[0].strip("`") for row in rows("| `model.pooling` |")) == sorted(POOLINGS)
