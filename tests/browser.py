"""A page in a real browser: Chromium, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
# Seconds that a condition of a page may take to come true.
PATIENCE = 60
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "/": (191, "/")}


def find_browser() -> str | None:
    """Path of a Chromium, if there is any."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page, and all that it asked for and complained of.

    Attributes:
        requests: Addresses that it asked for.
        complaints: Exceptions, errors and warnings of its console.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command, and returns what it gives."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method}
        message["params"] = params
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            new = os.read(self._from, 2**20)
            assert new, "the browser has ended"
            self._rest += new
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        if method == "Runtime.consoleAPICalled" and params["type"] != "log":
            self.complaints.append(json.dumps(params["args"]))

    def open(self, address: str, width: int, height: int, dark: bool = False) -> None:
        """Goes to an address, in a window of such a size in px."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {
            "name": "prefers-color-scheme",
            "value": "dark" if dark else "light",
        }
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        found = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits for a condition of the page."""
        end = time.monotonic() + PATIENCE
        frame = "new Promise(done => setTimeout(done, 20))"
        while not self.value(f"{frame}.then(() => Boolean({condition}))"):
            assert time.monotonic() < end, (condition, self.complaints)

    def press(self, key: str) -> None:
        """Presses a key, as a user does."""
        code, text = KEYS.get(key, (0, ""))
        event = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Clicks at a place of an element, fractions of its width and height."""
        box = self.value(
            f"(e => (e.scrollIntoView({{block: 'center'}}), "
            f"e.getBoundingClientRect().toJSON()))({_element(selector)})"
        )
        place = {
            "x": box["x"] + x * box["width"],
            "y": box["y"] + y * box["height"],
            "button": "left",
            "clickCount": 1,
        }
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def back(self) -> None:
        """Presses the button."""
        self.value("history.back()")

    def picture(self, path: Path) -> None:
        """Writes what is seen as PNG."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))


def _element(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"


@contextmanager
def browser(executable: str, profile: Path) -> Iterator[Browser]:
    """Starts a browser without a window, and ends it.

    Args:
        executable:
            What `find_browser` found.
        profile:
            Folder for what it keeps.
    """
    to_browser, from_browser = os.pipe(), os.pipe()
    # The browser reads commands from file 3, and answers to file 4.
    command = f'exec "$0" "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    options += ["--remote-debugging-pipe", "--disable-background-networking"]
    process = subprocess.Popen(
        ["bash", "-c", command, executable, *options],
        pass_fds=(to_browser[0], from_browser[1]),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Browser(to_browser[1], from_browser[0])
    finally:
        os.close(to_browser[1])  # which ends it
        os.close(from_browser[0])
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
