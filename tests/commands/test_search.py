"""`megam3 search`: a terminal, JSON for programs, and a page in a real browser."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from megam3.cli import main
from megam3.commands.search import _corpus, _parser
from megam3.errors import ConfigError
from megam3.report.search_server import SearchServer
from tests.factory import make_sentences, make_tiny_model_folder
from tests.report.test_page import measure, needs_browser, read_page

HOSTILE = '</p><script>alert(1)</script><img src=x onerror="alert(2)"> fox'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("search")
    make_tiny_model_folder(top / "model")
    texts = [*make_sentences(30, seed=1), HOSTILE, "long-word-without-any-space-" * 12]
    (top / "pages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return top


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[SearchServer]:
    corpus = _corpus(_parser().parse_args([str(folder / "model"), str(folder / "pages.jsonl")]))
    with SearchServer(corpus, title="Search <pages>", num_hits=3) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def get(server: SearchServer, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    request = urllib.request.Request(server.address.rstrip("/") + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


def command(folder: Path, *options: str) -> list[str]:
    return ["search", str(folder / "model"), str(folder / "pages.jsonl"), *options]


def test_modes_side_by_side_in_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text, *_) = make_sentences(30, seed=1)
    assert main(command(folder, "--query", text, "--top", "1")) == 0
    out = capsys.readouterr().out
    assert all(mode in out for mode in ("Dense", "Sparse", "Multi-vec", "Dense+Sparse", "All"))
    assert out.count(text.split()[0]) >= 5  # the query, and most modes find it


def test_json_for_programs_and_queries_from_stdin(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queries = tmp_path / "queries.txt"
    queries.write_text("bafo gi\n\nlu ze\n")
    with queries.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert main(command(folder, "--json", "--top", "2")) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [answer["query"] for answer in answers] == ["bafo gi", "lu ze"]
    assert [len(hits) for hits in answers[0]["modes"].values()][0] == 2
    assert set(answers[0]["modes"]["All"][0]) == {"row", "score", "text"}


def test_bad_input_is_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--top", "0")) == 2
    assert "--top = 0: must be at least 1" in capsys.readouterr().err
    assert main(["search", str(folder / "nope"), str(folder / "pages.jsonl")]) == 2
    assert "no folder on this machine" in capsys.readouterr().err


def test_the_page_answers_and_escapes(server: SearchServer) -> None:
    status, html, headers = get(server, "/?q=" + quote('fox "<script>'))
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    reader = read_page(html)
    assert not {tag for tag, _ in reader.elements} & {"script", "img", "link", "iframe", "object"}
    assert not [names for _, names in reader.elements if any(name.startswith("on") for name in names)]
    assert [names.get("value") for tag, names in reader.elements if tag == "input"] == ['fox "<script>']
    words = "".join(reader.words)
    assert "Search <pages>" in words
    assert all(mode in reader.words for mode in ("Dense", "Sparse", "Multi-vec", "Dense+Sparse", "All"))
    marks = [names for tag, names in reader.elements if tag == "mark"]
    assert any("multi-vector" in (names.get("title") or "") for names in marks)


def test_a_hostile_passage_stays_text(server: SearchServer) -> None:
    reader = read_page(get(server, "/?q=" + quote(HOSTILE))[1])
    assert not {tag for tag, _ in reader.elements} & {"script", "img"}
    assert "alert" in "".join(reader.words)


def test_json_other_paths_and_a_query_too_long(server: SearchServer) -> None:
    status, text, _ = get(server, "/search.json?q=" + quote("bafo"))
    assert status == 200
    assert len(json.loads(text)["modes"]["Dense"]) == 3
    assert get(server, "/search.json")[1] == "{}"
    assert get(server, "/etc/passwd")[0] == 404
    assert get(server, "/?q=" + "a" * 20_001)[0] == 414
    assert "<form" in get(server, "/")[1]


def test_only_loopback_and_only_under_its_name(server: SearchServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/?q=a", Host="evil.example")[0] == 403
    assert get(server, "/?q=a", Host="localhost:1")[0] == 200


def test_a_port_in_use_is_said(server: SearchServer) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on.*take another --port"):
        SearchServer(server.corpus, title="", num_hits=1, port=server.server_address[1])


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_screen(server: SearchServer, tmp_path: Path, width: int) -> None:
    html = get(server, "/?q=" + quote("long-word-without-any-space"))[1]
    given, taken, _ = measure(html, width, tmp_path)
    assert given > width - 30
    assert taken == given


@needs_browser
def test_the_page_in_dark_mode(server: SearchServer, tmp_path: Path) -> None:
    dark = measure(get(server, "/")[1], 390, tmp_path, "--blink-settings=preferredColorScheme=0")[2]
    assert dark == "rgb(20, 24, 28)"
