"""The page of `megam3 search --serve`: a form, and the answer in five columns. No script, nothing loaded."""

from __future__ import annotations

from megam3.report.matches import LEGEND, MATCH_STYLE, passage_html
from megam3.report.style import STYLE
from megam3.report.text import safe
from megam3.retrieval.corpus import Answer

POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"


def search_page(title: str, about: str, answer: Answer | None) -> str:
    """The whole HTML document; without an answer, the form alone."""
    query = "" if answer is None else answer.query
    shown = safe(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        f"'unsafe-inline'; form-action 'self'\">"
        f"<title>{shown}</title><style>{STYLE}{MATCH_STYLE}</style></head>\n"
        f'<body><h1>{shown}</h1><p class="note">{safe(about)}</p>'
        f'<form action="/" method="get"><input name="q" value="{safe(query)}" aria-label="query" '
        "autofocus required><button>Search</button></form>\n"
        f"{'' if answer is None else _answer(answer)}\n</body></html>\n"
    )


def _answer(answer: Answer) -> str:
    columns = []
    for mode, ranking in answer.rankings.items():
        hits = "".join(
            f'<div class="hit"><span class="score">{place}. {found.score:.4f}</span> '
            f"{passage_html(answer.segments[found.row])}</div>"
            for place, found in enumerate(ranking, 1)
        )
        columns.append(f"<div><h2>{safe(mode)}</h2>{hits or '<p>nothing found</p>'}</div>")
    return f'{LEGEND}<div class="modes">{"".join(columns)}</div>'
