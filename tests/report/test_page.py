"""The page: its figures, valid HTML without outside resources, escaping; and in a real browser, its width."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megam3.report.page import page
from megam3.report.record import read_run
from tests.report.run_folders import write_run

VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADING = {"src", "href", "xlink:href", "data", "action", "poster", "srcset", "background"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (package chromium)")
BROWSER_SECONDS = 120


class Reader(HTMLParser):
    """Checks that every element is closed in order, and notes elements, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def read_page(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def text_of(html: str) -> str:
    return "\n".join(read_page(html).words)


def test_the_figures_of_a_run_are_there(tmp_path: Path) -> None:
    text = text_of(page([read_run(write_run(tmp_path / "run"))]))
    for shown in (
        "loss/dense",
        "2.125",  # its last value
        "10,000",  # gradient norm of step 4
        "4e-05",  # learning rate of step 4
        "12.5%",  # share of peak
        "2.91 (device allocations)",
        "of the heaviest: score matrices",
        "4,321 records, 765,432 tokens, 17 texts cut, 3 records rejected",
        "≤ 256 tokens",
        "heldout, step 4 (11 queries, 37 passages)",
        "0.432",
        "+0.032",  # over BM25
        "torch",
        "9.8.7",
        "some/encoder",
        "figures left out because they are no finite numbers: 1",
    ):
        assert shown in text, shown
    assert "0.331" not in text  # the tables are of the newest evaluation


def test_evaluation_over_time_has_a_line_a_mode(tmp_path: Path) -> None:
    html = page([read_run(write_run(tmp_path / "run"))])
    chart = re.search(r'<svg[^>]*aria-label="one, heldout: ndcg@10 over steps".*?</svg>', html)
    assert chart is not None
    assert chart[0].count('class="line ') == 2
    assert "Dense, step 4: 0.432" in chart[0]
    assert "BM25, step 4: 0.4" in chart[0]


def test_several_runs_share_charts_and_show_what_differs(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a", "first", "1e-5")),
        read_run(write_run(tmp_path / "b", "second", "3e-5")),
    ]
    html = page(runs)
    chart = re.search(r'<svg[^>]*aria-label="loss/total over steps".*?</svg>', html)
    assert chart is not None
    assert chart[0].count('class="line ') == 2
    row = re.search(r"<tr><td>optim.lr</td>.*?</tr>", html)
    assert row is not None
    assert "1e-05" in row[0]
    assert "3e-05" in row[0]
    assert "<td>model.path</td>" not in html  # equal in both
    assert "Recipe fields that differ" not in page(runs[:1])


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    html = page([read_run(write_run(tmp_path / "run"))])
    reader = read_page(html)
    assert not {tag for tag, _ in reader.elements} & {"script", "link", "iframe", "img", "object", "base"}
    assert not [names for _, names in reader.elements if LOADING & set(names)]
    assert not re.search(r"https?:|url\(|@import|//", html)
    policies = [names for tag, names in reader.elements if tag == "meta" and "http-equiv" in names]
    assert [names["content"] for names in policies] == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = '</title><script>alert(1)</script><img src=x onerror="alert(2)">\'&'
    folder = write_run(tmp_path / "run", hostile)
    for path in (folder / "eval").iterdir():
        path.write_text(path.read_text().replace("heldout", "<script>x</script>").replace("sw", "<img>"))
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("loss/dense", "loss/<svg onload=x>"))
    (folder / "env.json").write_text('{"<script>": "</table><script>"}')
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text() + "x: </pre><script>\n")
    html = page([read_run(folder)])
    reader = read_page(html)
    assert not {tag for tag, _ in reader.elements} & {"script", "img"}
    assert not [names for _, names in reader.elements if any(name.startswith("on") for name in names)]
    assert hostile in reader.words


def test_a_page_without_evaluation_memory_and_data(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.5}\n')
    text = text_of(page([read_run(tmp_path)]))
    assert "2.5" in text
    assert "BM25" not in text
    assert "Memory" not in text
    assert "recipe.yaml: No such" in text


HARNESS = """<!DOCTYPE html><iframe id="frame" style="width:{width}px;height:600px;border:0"></iframe><script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument;
  document.documentElement.dataset.result = page.documentElement.clientWidth + "/" +
    page.documentElement.scrollWidth + "/" + getComputedStyle(page.body).backgroundColor;
}};
frame.srcdoc = {html};
</script>"""
"""A browser's own window has a least width; a frame has not. It takes the page as it is, policy included."""


def measure(html: str, width: int, folder: Path, *options: str) -> tuple[int, int, str]:
    """(width for the page, width it takes, background colour) in headless chromium."""
    assert BROWSER is not None
    quoted = '"' + "".join(f"\\u{ord(c):04x}" if c in '"\\<\n' else c for c in html) + '"'
    file = folder / "harness.html"
    file.write_text('<meta charset="utf-8">' + HARNESS.format(width=width, html=quoted), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += [*options, "--window-size=1400,800", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_SECONDS, check=True)
    found = re.search(r'data-result="(\d+)/(\d+)/([^"]+)"', result.stdout)
    assert found is not None, result.stdout[-500:] + result.stderr[-500:]
    return int(found[1]), int(found[2]), found[3]


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_no_horizontal_overflow_in_a_browser(tmp_path: Path, width: int) -> None:
    long = "a-run-name-without-any-space-" * 6
    runs = [
        read_run(write_run(tmp_path / "a", long, "1e-5")),
        read_run(write_run(tmp_path / "b", "b", "2e-5")),
    ]
    html = page(runs).replace("<details>", "<details open>")
    given, taken, _ = measure(html, width, tmp_path)
    assert given > width - 30
    assert taken == given
    wide = html.replace("<h1>", '<div style="width:2000px">x</div><h1>')
    assert measure(wide, width, tmp_path)[1] >= 2000  # the measure itself notices


@needs_browser
def test_dark_mode_in_a_browser(tmp_path: Path) -> None:
    html = page([read_run(write_run(tmp_path / "run"))])
    light = measure(html, 390, tmp_path, "--blink-settings=preferredColorScheme=1")[2]
    dark = measure(html, 390, tmp_path, "--blink-settings=preferredColorScheme=0")[2]
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 24, 28)")
