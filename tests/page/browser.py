"""A real Chromium without a window, spoken to over its DevTools protocol: what a person would do and see.

https://chromedevtools.github.io/devtools-protocol/ (tot) has the methods.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

START_SECONDS = 60.0
ANSWER_SECONDS = 60.0
LOOK_SECONDS = 0.05

KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32}


def chromium() -> str:
    """Its path.

    Raises:
        AssertionError: there is none, and how to get one.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    raise AssertionError("the page is tested in Chromium, and there is none. Fix: make programs")


class Browser:
    """One Chromium process with a profile of its own."""

    def __init__(self, directory: Path) -> None:
        self._profile = directory / "chromium"
        command = [
            chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--mute-audio",
            "--remote-debugging-port=0", f"--user-data-dir={self._profile}", "about:blank",
        ]  # fmt: skip
        self._log = (directory / "chromium.log").open("ab")
        self._child = subprocess.Popen(command, stdout=self._log, stderr=self._log, start_new_session=True)
        self._url = ""
        self._tabs = contextlib.ExitStack()

    def open(self, url: str, width: int = 1280, height: int = 900) -> "Tab":
        """A new tab that shows ``url``."""
        tab = Tab(self._tabs.enter_context(connect(self._endpoint(), max_size=None, compression=None)))
        target = tab.send("Target.createTarget", url="about:blank")["targetId"]
        tab.session = tab.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.send(f"{domain}.enable")
        tab.size(width, height)
        tab.send("Page.navigate", url=url)
        return tab

    def close(self) -> None:
        self._tabs.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._log.close()

    def _endpoint(self) -> str:
        file, deadline = self._profile / "DevToolsActivePort", time.monotonic() + START_SECONDS
        while not self._url:
            assert self._child.poll() is None, Path(self._log.name).read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline, f"Chromium does not start within {START_SECONDS:g} s"
            with contextlib.suppress(FileNotFoundError, ValueError):
                port, path = file.read_text().split()
                self._url = f"ws://127.0.0.1:{port}{path}"
            time.sleep(LOOK_SECONDS)
        return self._url


class Tab:
    """One tab. ``requests``: URLs that it asked for; ``given_up``: how many of them it ended itself; ``complaints``:
    errors of scripts and of the policy."""

    def __init__(self, control: ClientConnection) -> None:
        self._control, self._number, self.session = control, 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.given_up = 0

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method; its result."""
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters}
        self._control.send(json.dumps({**order, "sessionId": self.session} if self.session else order))
        while True:
            said = json.loads(self._control.recv(timeout=ANSWER_SECONDS))
            if said.get("id") == self._number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]
            self._heard(said.get("method", ""), said.get("params", {}))

    def _heard(self, event: str, said: Any) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event == "Network.loadingFailed" and said.get("canceled"):
            self.given_up += 1
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"])[:600])
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.complaints.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")

    # ----------------------------------------------------------------------------------------------------- what is seen
    def look(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def text(self, selector: str = "body") -> str:
        """The text that is shown; empty where nothing is."""
        return str(self.look(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def until(self, expression: str, what: str, seconds: float = ANSWER_SECONDS) -> Any:
        """Wait until ``expression`` is true."""
        return self.until_done(lambda: self.look(expression), what, seconds)

    def until_done(self, holds: Callable[[], Any], what: str, seconds: float = ANSWER_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := holds():
                return found
            time.sleep(LOOK_SECONDS)
        raise AssertionError(f"waited {seconds:g} s for {what}\n{self.text()}\n{self.complaints}")

    def shows(self, text: str, selector: str = "body", seconds: float = ANSWER_SECONDS) -> None:
        """Wait until ``text`` is shown."""
        where = json.dumps(selector)
        self.until(f"document.querySelector({where})?.innerText.includes({json.dumps(text)})", repr(text), seconds)

    def picture(self) -> bytes:
        """PNG of what is on the screen."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    # ----------------------------------------------------------------------------------------------------- what is done
    def size(self, width: int, height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """``light`` or ``dark``, as the system would say."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def press(self, key: str, shift: bool = False) -> None:
        base = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        base["modifiers"] = 8 if shift else 0
        text = {"Enter": {"text": "\r"}, "Space": {"text": " "}}.get(key, {})
        self.send("Input.dispatchKeyEvent", type="keyDown", **base, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **base)

    def write(self, text: str) -> None:
        """Into what has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the first element that ``selector`` finds."""
        place = self.look(f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: "center"}});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)


@contextlib.contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A Browser that is gone at the end."""
    started = Browser(directory)
    try:
        yield started
    finally:
        started.close()
