"""Help pages as records: read Mallard XML (title, one-sentence description, body) in every language a page is
really translated to."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megam3.errors import DataError

_NAMESPACE = "{http://projectmallard.org/1.0/}"
_TEXT_BLOCKS = {
    _NAMESPACE + name for name in ("p", "title", "subtitle", "desc", "item", "td", "cite", "code", "screen")
}
_LONG_LINE = 20
"""Characters from which a line says something about its language; shorter ones are often names of buttons and
keys."""
_SOURCE_FOLDER = "C"
"""Where Mallard help keeps the untranslated (English) pages."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One help page in one language."""

    language: str
    """BCP 47, such as `pt-BR`."""
    name: str
    """`guide/page`, the same in all languages."""
    title: str
    description: str
    body: str
    """One line per block of text."""


def language_tag(folder_name: str) -> str:
    """BCP 47 tag of a locale folder.

    >>> language_tag("C"), language_tag("pt_BR"), language_tag("sr@latin")
    ('en', 'pt-BR', 'sr-Latn')
    """
    if folder_name == _SOURCE_FOLDER:
        return "en"
    return folder_name.replace("@latin", "-Latn").replace("_", "-")


def _flat_text(element: ET.Element | None) -> str:
    return re.sub(r"\s+", " ", "".join(element.itertext())).strip() if element is not None else ""


def _block_texts(element: ET.Element) -> Iterator[str]:
    """Texts of the innermost blocks, in reading order; `info` (credits, revisions, the description) is not
    part of the body."""
    for child in element:
        if child.tag == _NAMESPACE + "info":
            continue
        if child.tag in _TEXT_BLOCKS and not any(
            inner.tag in _TEXT_BLOCKS for inner in child.iter() if inner is not child
        ):
            text = _flat_text(child)
            if text:
                yield text
        else:
            yield from _block_texts(child)


def read_page(path: Path, language: str) -> Page | None:
    """Parse one `.page` file; None when it is not well-formed XML."""
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError:
        return None
    title = _flat_text(root.find(_NAMESPACE + "title"))
    lines = list(_block_texts(root))
    if lines and lines[0] == title:
        lines = lines[1:]
    description = _flat_text(root.find(f"{_NAMESPACE}info/{_NAMESPACE}desc"))
    return Page(
        language=language,
        name=f"{path.parent.name}/{path.stem}",
        title=title,
        description=description,
        body="\n".join(lines),
    )


def is_translated(body: str, english_body: str) -> bool:
    """Whether fewer than 20 % of the long lines equal lines of the English page; a page without long lines
    does not count."""
    long_lines = [line for line in body.split("\n") if len(line) > _LONG_LINE]
    english_lines = set(english_body.split("\n"))
    return bool(long_lines) and sum(line in english_lines for line in long_lines) < 0.2 * len(long_lines)


def read_help_pages(folder: str | Path, min_body_chars: int = 200) -> list[Page]:
    """All usable pages below `folder` (one sub-folder per locale), sorted by language and name.

    Left out: pages that fall back to English, pages with hardly any text, and pages whose English original is
    missing. A title or description that is still English on a translated page becomes empty.

    Raises:
        DataError: no page found.
    """
    folder = Path(folder)
    english = {page.name: page for page in _read_locale(folder / _SOURCE_FOLDER)}
    pages = [page for page in english.values() if len(page.body) >= min_body_chars]
    for locale in sorted(path for path in folder.glob("*") if path.is_dir() and path.name != _SOURCE_FOLDER):
        for page in _read_locale(locale):
            source = english.get(page.name)
            if source is None or len(page.body) < min_body_chars or not is_translated(page.body, source.body):
                continue
            title = "" if page.title == source.title else page.title
            description = "" if page.description == source.description else page.description
            pages.append(replace(page, title=title, description=description))
    if not pages:
        raise DataError(
            "quickstart corpus",
            str(folder),
            "holds no Mallard help pages (LOCALE/GUIDE/NAME.page)",
            "delete it to fetch it again",
        )
    return sorted(pages, key=lambda page: (page.language, page.name))


def _read_locale(folder: Path) -> Iterator[Page]:
    for path in sorted(folder.glob("*/*.page")):
        page = read_page(path, language_tag(folder.name))
        if page is not None:
            yield page
