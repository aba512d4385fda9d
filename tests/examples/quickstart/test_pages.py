import pytest

from examples.quickstart.pages import is_translated, language_tag, read_help_pages, read_page
from megam3.errors import DataError

PAGE = """<?xml version="1.0" encoding="utf-8"?>
<page xmlns="http://projectmallard.org/1.0/" id="{name}">
  <info><desc>{desc}</desc><credit><name>Jane Doe</name></credit></info>
  <title>{title}</title>
  <p>{body}</p>
  <steps><item><p>Press   <gui>Save</gui> now.</p></item></steps>
</page>"""
ENGLISH = "This page explains at length how to change the brightness of the screen. " * 5
GERMAN = "Diese Seite erklärt ausführlich, wie die Helligkeit des Bildschirms geändert wird. " * 5


def write(folder, locale, name, title, desc, body):
    path = folder / locale / "guide" / f"{name}.page"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PAGE.format(name=name, title=title, desc=desc, body=body), encoding="utf-8")
    return path


def test_a_page_has_title_description_and_body_without_credits(tmp_path):
    page = read_page(write(tmp_path, "C", "screen", "Brightness", "Change it.", "One\n  line."), "en")
    assert (page.name, page.title, page.description, page.body) == (
        "guide/screen",
        "Brightness",
        "Change it.",
        "One line.\nPress Save now.",
    )


def test_a_broken_page_is_left_out(tmp_path):
    path = write(tmp_path, "C", "screen", "Brightness", "Change it.", "&broken")
    assert read_page(path, "en") is None


def test_pages_that_fall_back_to_english_are_left_out_and_english_queries_dropped(tmp_path):
    write(tmp_path, "C", "screen", "Brightness", "Change it.", ENGLISH)
    write(tmp_path, "de", "screen", "Helligkeit", "Change it.", GERMAN)
    write(tmp_path, "fr", "screen", "Luminosité", "La changer.", ENGLISH)
    write(tmp_path, "pt_BR", "orphan", "Brilho", "Mudar.", GERMAN)
    pages = read_help_pages(tmp_path)
    assert [(page.language, page.title, page.description) for page in pages] == [
        ("de", "Helligkeit", ""),
        ("en", "Brightness", "Change it."),
    ]


@pytest.mark.parametrize(("equal_lines", "translated"), [(1, True), (2, False)])
def test_the_limit_is_a_fifth_of_the_long_lines(equal_lines, translated):
    english = [f"a long line of English text, number {i}" for i in range(10)]
    german = (
        english[:equal_lines]
        + [f"eine lange Zeile auf Deutsch, Nummer {i}" for i in range(equal_lines, 10)]
        + ["OK"] * 5
    )
    assert is_translated("\n".join(german), "\n".join([*english, "OK"])) is translated


@pytest.mark.parametrize(
    ("folder", "tag"), [("C", "en"), ("zh_CN", "zh-CN"), ("sr@latin", "sr-Latn"), ("de", "de")]
)
def test_language_tags(folder, tag):
    assert language_tag(folder) == tag


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no Mallard help pages .*delete it to fetch it again"):
        read_help_pages(tmp_path)
