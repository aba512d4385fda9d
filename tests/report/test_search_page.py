"""The search page in a real browser, used as a person does: type, press Enter, read five columns."""

import json
import threading
from collections.abc import Iterator

import pytest

from megam3.commands.search import _corpus, _parser
from megam3.report.search_server import SearchServer, is_loopback
from tests.factory import make_sentences, make_tiny_model_folder
from tests.report.browser import BROWSER, Browser

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (package chromium)")

HOSTILE = (
    "</mark></div><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> fox"
)
MODES = ["Dense", "Sparse", "Multi-vec", "Dense+Sparse", "All"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchServer]:
    folder = tmp_path_factory.mktemp("page")
    make_tiny_model_folder(folder / "model")
    texts = [*make_sentences(20, seed=1), HOSTILE]
    (folder / "pages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = _corpus(_parser().parse_args([str(folder / "model"), str(folder / "pages.jsonl")]))
    # as `--serve` without --host
    with SearchServer(corpus, title="Search <b>pages</b>", num_hits=3, port=0) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def ask(browser: Browser, server: SearchServer, query: str) -> None:
    browser.open(server.address)
    browser.until("document.activeElement.name === 'q'")  # ready to type at once
    browser.type(query)
    browser.press_enter()
    browser.until("document.readyState === 'complete' && document.querySelectorAll('.modes').length === 1")


def test_a_typed_query_is_answered_in_five_columns(browser: Browser, server: SearchServer) -> None:
    (text, *_) = make_sentences(20, seed=1)
    ask(browser, server, text)
    assert browser.read("[...document.querySelectorAll('.modes h2')].map(e => e.textContent)") == MODES
    assert browser.read("document.querySelector('input[name=q]').value") == text
    first = browser.read("document.querySelector('.modes > div .hit').textContent")
    assert first.startswith("1. 1.0000 ")
    assert text in first
    per_column = browser.read(
        "[...document.querySelectorAll('.modes > div')].map(e => e.querySelectorAll('.hit').length)"
    )
    assert per_column[0] == 3
    assert max(per_column) == 3


def test_matches_are_coloured_by_strength(browser: Browser, server: SearchServer) -> None:
    ask(browser, server, make_sentences(20, seed=1)[2])
    colours = browser.read(
        "[...document.querySelectorAll('.hit mark')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(colours)) > 2  # strong, weak, none
    assert browser.read(
        "[...document.querySelectorAll('.hit mark')].every(e => /multi-vector/.test(e.title))"
    )


def test_hostile_queries_and_passages_stay_text(browser: Browser, server: SearchServer) -> None:
    ask(browser, server, HOSTILE)
    assert browser.read("document.title") == "Search <b>pages</b>"
    assert browser.read("document.querySelectorAll('script, img, b').length") == 0
    assert browser.read("document.querySelector('input[name=q]').value") == HOSTILE
    assert HOSTILE in browser.read("document.querySelector('.modes').textContent")


def test_it_is_served_to_this_machine_alone(server: SearchServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert is_loopback(_parser().parse_args(["model", "pages.jsonl", "--serve"]).host)
