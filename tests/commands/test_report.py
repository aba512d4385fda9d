"""`megam3 report`: where the page goes, and what a wrong folder is told."""

from pathlib import Path

import pytest

from megam3.cli import main
from tests.report.run_folders import write_run


def test_the_page_lies_in_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", "my run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "<title>my run</title>" in (folder / "report.html").read_text(encoding="utf-8")


def test_out_names_another_file(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", "first"), write_run(tmp_path / "b", "second")
    out = tmp_path / "both.html"
    assert main(["report", str(first), str(second), "--out", str(out)]) == 0
    assert "<title>first, second</title>" in out.read_text(encoding="utf-8")
    assert not (first / "report.html").exists()


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_that_is_no_run(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megam3: error: run folder = ")
    assert str(tmp_path / name) in said
    assert not (tmp_path / "empty" / "report.html").exists()


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "--out = " in (said := capsys.readouterr().err)
    assert "cannot be written (No such file" in said
