"""A passage as HTML, the words that matched in colour: lexical weights as background, MaxSim as underline."""

from __future__ import annotations

from collections.abc import Sequence

from megam3.report.text import safe
from megam3.retrieval.matches import Segment

MATCH_STYLE = """
.note mark { color: var(--text); } mark { color: inherit; border-radius: 3px; padding: 0 1px;
  background: color-mix(in srgb, var(--c0) calc(var(--lex) * 60%), transparent);
  text-decoration: underline 3px color-mix(in srgb, var(--c1) calc(var(--mul) * 100%), transparent); }
.hit { margin: 0 0 12px; } .hit .score { color: var(--faint); font-variant-numeric: tabular-nums; }
.modes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 210px), 1fr)); gap: 16px; }
.modes > div { min-width: 0; } .modes h4 { margin: 0 0 4px; } .relevant { color: var(--c2); }
form { display: flex; gap: 8px; margin: 8px 0; } input { flex: 1; min-width: 0; font: inherit; padding: 6px; }
button { font: inherit; }
"""
LEGEND = (
    '<p class="note"><mark style="--lex:1;--mul:0">lexical weight</mark> as background, '
    '<mark style="--lex:0;--mul:1">multi-vector alignment</mark> as underline; '
    "the stronger, the more it adds to the score</p>"
)
MAX_CHARACTERS = 600
"""Of a passage that are shown."""


def passage_html(segments: Sequence[Segment], max_characters: int = MAX_CHARACTERS) -> str:
    """The first characters of a passage, each match as a `mark` whose strength is its share of the largest.

    `title` tells the numbers, so that nothing is told by colour alone.
    """
    most_lexical = max((s.lexical for s in segments), default=0.0) or 1.0
    most_multi = max((s.multi_vector for s in segments), default=0.0) or 1.0
    parts = []
    room = max_characters
    for segment in segments:
        if room <= 0:
            parts.append("…")
            break
        shown = safe(segment.text[:room])
        room -= len(segment.text)
        if segment.lexical <= 0 and segment.multi_vector <= 0:
            parts.append(shown)
            continue
        share = max(0.0, segment.lexical / most_lexical), max(0.0, segment.multi_vector / most_multi)
        about = f"lexical {segment.lexical:.4f}, multi-vector {segment.multi_vector:.4f}"
        parts.append(
            f'<mark style="--lex:{share[0]:.2f};--mul:{share[1]:.2f}" title="{about}">{shown}</mark>'
        )
    return "".join(parts)
