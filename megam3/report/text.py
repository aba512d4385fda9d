"""Text, numbers and tables as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence


def safe(value: object) -> str:
    """`value` as text for HTML, also inside an attribute; what is no UTF-8 in a file name becomes `?`."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def figure(value: float) -> str:
    """A number as short as a reader needs it.

    >>> [figure(value) for value in (0.0, 12345.6, 3.14159, 0.00012345)]
    ['0', '12,346', '3.142', '0.0001234']
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "plain") -> str:
    """A table that scrolls by itself where it is wider than the screen. Cells are HTML already."""
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{titles}</tr>{body}</table></div>'
