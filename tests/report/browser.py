"""A headless Chromium that a test drives: it types, presses keys and reads the page, as a person would.

Its debugging protocol goes through two pipes, one JSON message each, ended by a zero byte; nothing listens.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_SECONDS = 120.0


class Browser:
    """One page of a browser; a context manager."""

    def __init__(self, folder: Path, *options: str):
        assert BROWSER is not None
        (commands, self._send), (self._receive, answers) = os.pipe(), os.pipe()
        command = [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *(f"--user-data-dir={folder / 'profile'}", *options, "about:blank"),
        ]

        # the protocol's pipes are descriptors 3 and 4; bash puts them there (dash knows one-digit numbers)
        shell = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", *command]
        self._process = subprocess.Popen(shell, pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self._buffer, self._number = b"", 0
        (target,) = [each for each in self._wait_targets() if each["type"] == "page"]
        attached = self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._send)
        os.close(self._receive)

    def open(self, address: str) -> None:
        """Go there."""
        self._ask("Page.navigate", self._session, url=address)
        self.until("document.readyState === 'complete'")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._ask("Input.insertText", self._session, text=text)

    def press_enter(self) -> None:
        """Down and up."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self._ask("Input.dispatchKeyEvent", self._session, type="keyDown", **key)
        self._ask("Input.dispatchKeyEvent", self._session, type="keyUp", **key)

    def read(self, expression: str) -> Any:
        """The value of an expression in the page; None while there is none."""
        found = self._ask("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        return found.get("result", {}).get("value")

    def until(self, expression: str) -> None:
        """Wait for an expression to become true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.read(expression) is not True:
            assert time.monotonic() < deadline, f"never came true: {expression}"
            time.sleep(0.05)

    def _wait_targets(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            found: list[dict[str, Any]] = self._ask("Target.getTargets")["targetInfos"]
            if any(each["type"] == "page" for each in found):
                return found
            assert time.monotonic() < deadline, "the browser opens no page"
            time.sleep(0.05)

    def _ask(self, method: str, session: str = "", /, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], WAIT_SECONDS)
            assert ready, "the browser does not answer"
            block = os.read(self._receive, 1 << 16)
            assert block, "the browser ended"
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed
