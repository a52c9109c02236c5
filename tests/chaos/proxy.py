"""A proxy between the daemon and one engine, which loses or withholds what it is told to."""

import threading
import time
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ports import HOST, free_port

UPSTREAM_SECONDS = 60.0


class Server(ThreadingHTTPServer):
    daemon_threads = True


class Proxy:
    """In front of the engine at port ``target``.

    Of the next call of ``path`` it loses the "request" or the "answer" (the connection breaks), or withholds the
    "late answer" until ``release``; ``harmed`` is set as soon as that has happened.
    """

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.harmed = threading.Event()
        self.at = 0.0
        self._target = target
        self._path, self._what = "", ""
        self._released = threading.Event()
        self._server = Server((HOST, self.port), type("ForwardHere", (Forward,), {"proxy": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def harm(self, path: str, what: str) -> None:
        self.harmed.clear()
        self._released.clear()
        self._path, self._what = path, what

    def release(self) -> None:
        self._released.set()

    def close(self) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def fate(self, path: str) -> str:
        """What becomes of this call; once."""
        if path.partition("?")[0] != self._path:
            return ""
        what, self._path = self._what, ""
        self.at = time.monotonic()
        return what

    def asked(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes] | None:
        """The engine's answer, or None for silence and a broken connection."""
        fate = self.fate(path)
        if fate == "request":
            self.harmed.set()
            return None
        connection = HTTPConnection(HOST, self._target, timeout=UPSTREAM_SECONDS)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            status, data = answer.status, answer.read()
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()
        if fate:
            self.harmed.set()
        if fate == "late answer":
            self._released.wait(UPSTREAM_SECONDS)
        return None if fate == "answer" else (status, data)


class Forward(BaseHTTPRequestHandler):
    """One connection through the proxy."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def do_OPTIONS(self) -> None:
        self._forward()

    def do_GET(self) -> None:
        self._forward()

    def do_POST(self) -> None:
        self._forward()

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        heard = self.proxy.asked(self.command, self.path, body, {"Content-Type": "application/json"})
        if heard is None:
            self.close_connection = True
            return
        status, data = heard
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass
