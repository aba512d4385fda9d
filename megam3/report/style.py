"""The page's style: one column on a phone, as many charts beside one another as fit on a wider screen."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --faint: #5c6670; --rule: #d9dee3;
  --c0: #0b62c4; --c1: #b8480b; --c2: #12803c; --c3: #8a2bc2; --c4: #a8780a; --c5: #c2185b; }
@media (prefers-color-scheme: dark) { :root { --back: #14181c; --text: #e6e9ec; --faint: #9aa5af;
  --rule: #333b43; --c0: #6ab0ff; --c1: #ff9b5e; --c2: #5fd38a; --c3: #cf9bff; --c4: #e8c04f;
  --c5: #ff86b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 12px; max-width: 1200px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4em; margin: .2em 0; } h2 { font-size: 1.15em; margin: 1.6em 0 .4em; }
h3 { font-size: 1em; margin: 1em 0 .3em; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .9em; } .last, .note { color: var(--faint); }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--faint); }
.grid { stroke: var(--rule); fill: none; } .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em; }
th, td { padding: 3px 10px 3px 0; text-align: right; border-bottom: 1px solid var(--rule);
  overflow-wrap: normal; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.heat td:not(:first-child) { padding: 3px 10px;
  background: color-mix(in srgb, var(--c0) calc(var(--share) * 55%), transparent); }
.bar { display: inline-block; height: .7em; background: var(--c0); min-width: 1px; }
.mix td:last-child { width: 40%; text-align: left; } .mix { width: 100%; max-width: 560px; }
pre { font-size: .85em; white-space: pre-wrap; } summary { cursor: pointer; }
""" + "\n".join(
    f".line-{n} {{ stroke: var(--c{n}); }} circle.line-{n} {{ fill: var(--c{n}); }} "
    f".key-{n} {{ color: var(--c{n}); font-weight: 600; }}"
    for n in range(6)
)
