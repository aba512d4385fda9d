"""A small HTTP server for one person: `/?q=…` answers with a page, `/search.json?q=…` with JSON.

It listens on the loopback interface unless told otherwise, reads no file, keeps nothing, and knows no user:
whoever reaches the port can query. On loopback it answers only requests for a loopback name, since a page of
another site may resolve a name of its own to 127.0.0.1 and read what comes back (DNS rebinding).
"""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from urllib.parse import parse_qs, urlsplit

from megam3.errors import ConfigError, UserError
from megam3.report.search_page import POLICY, search_page
from megam3.retrieval.corpus import Answer, Corpus

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_QUERY_CHARACTERS = 20_000


class SearchServer(ThreadingHTTPServer):
    """Serves one corpus.

    Raises:
        ConfigError: the address cannot be had.
    """

    daemon_threads = True

    def __init__(self, corpus: Corpus, *, title: str, num_hits: int, host: str = LOOPBACK, port: int = 0):
        self.corpus, self.title, self.num_hits = corpus, title, num_hits
        self.only_loopback = is_loopback(host)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            rule = f"cannot be listened on ({getattr(error, 'strerror', None) or error})"
            raise ConfigError("--host, --port", f"{host}:{port}", rule, "take another --port") from None

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"


def is_loopback(host: str) -> bool:
    """Whether `host`, perhaps with a port, means this machine's loopback interface.

    >>> is_loopback("localhost:8080"), is_loopback("[::1]:80"), is_loopback("evil.example")
    (True, True, False)
    """
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def answer_json(answer: Answer) -> dict[str, object]:
    """An answer for programs: by mode, passages with their scores."""
    return {
        "query": answer.query,
        "modes": {
            mode: [{"row": found.row, "score": found.score, "text": found.text} for found in ranking]
            for mode, ranking in answer.rankings.items()
        },
    }


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    server_version = "megam3"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        """Answer one request."""
        if self.server.only_loopback and not is_loopback(self.headers.get("Host", "")):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "only for this machine\n")
            return
        url = urlsplit(self.path)
        if url.path not in ("/", "/search.json"):
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there are / and /search.json\n")
            return
        query = parse_qs(url.query).get("q", [""])[0].strip()
        if len(query) > MAX_QUERY_CHARACTERS:
            self._send(HTTPStatus.REQUEST_URI_TOO_LONG, "text/plain", "the query is too long\n")
            return
        try:
            answer = self.server.corpus.search(query, self.server.num_hits) if query else None
        except UserError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n")
            return
        if url.path == "/search.json":
            found = {} if answer is None else answer_json(answer)
            self._send(HTTPStatus.OK, "application/json", json.dumps(found, ensure_ascii=False))
        else:
            size = f"{len(self.server.corpus.index):,} passages"
            self._send(HTTPStatus.OK, "text/html", search_page(self.server.title, size, answer))

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """To the log instead of stderr, where the prompt is."""
        logger.debug(format, *args)
