"""Strangers at the daemon's door, as many and as busy as they are told: a process of its own, on loopback.

Arguments: port, places that half requests hold, places that silent connections hold, wrong tokens a second, and with
``tls``: half requests are half handshakes then, and wrong tokens come behind whole ones. Lines of standard input are
``on`` and ``off``; each is answered with a line of JSON, of ``off`` with what was done meanwhile.

A held place is taken again as soon as the daemon ends it, all of a kind at most once a second. They come from ADDRESSES
addresses, as strangers do who want more than the places that one address has.
"""

import errno
import json
import os
import selectors
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

ADDRESSES = 64
SLICE_SECONDS = 0.02
HALF = b"GET /status HTTP/1.1\r\nHost: x\r\nX-Never: "
WRONG = b"GET /status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nConnection: close\r\n\r\n"
ABORT = struct.pack("ii", 1, 0)


def give_way() -> None:
    """Strangers have machines of their own; here they share the daemon's, and run when nobody else wants to."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@dataclass(eq=False)
class Plain:
    """One stranger who says ``words`` and hears what comes."""

    words: bytes

    def first(self) -> bytes:
        """What it says when it is connected."""
        return self.words

    def hears(self, heard: bytes) -> tuple[bytes, bytes]:
        """What it says to that, and what it was told."""
        return b"", heard


@dataclass(eq=False)
class Shaking:
    """One who comes with TLS, and says ``words`` when the handshake is done; without words, it leaves it half done."""

    words: bytes
    context: ssl.SSLContext
    incoming: ssl.MemoryBIO = field(default_factory=ssl.MemoryBIO)
    outgoing: ssl.MemoryBIO = field(default_factory=ssl.MemoryBIO)
    is_done: bool = False

    def __post_init__(self) -> None:
        self._tls = self.context.wrap_bio(self.incoming, self.outgoing, server_hostname="x")

    def first(self) -> bytes:
        return self._goes_on()

    def hears(self, heard: bytes) -> tuple[bytes, bytes]:
        if not self.words:
            return b"", b""
        self.incoming.write(heard)
        said = self._goes_on()
        try:
            return said, self._tls.read(4096) if self.is_done else b""
        except ssl.SSLWantReadError:
            return said, b""

    def _goes_on(self) -> bytes:
        try:
            if not self.is_done:
                self._tls.do_handshake()
                self.is_done = True
                self._tls.write(self.words)
        except ssl.SSLWantReadError:
            pass
        return self.outgoing.read()


class Crowd:
    """Strangers of one kind: ``held`` at a time, or ``rate`` a second that go when they are answered."""

    def __init__(self, name: str, port: int, words: bytes, held: int, rate: float, tls: ssl.SSLContext | None) -> None:
        self.name, self.held, self.rate = name, held, rate
        self._port, self._words, self._tls = port, words, tls
        self._budget = 0.0
        self.sockets: dict[socket.socket, Plain | Shaking] = {}
        self.counts: Counter[str] = Counter()

    def come(self, seconds: float, selector: selectors.BaseSelector) -> None:
        """Those who are due after ``seconds`` more."""
        self._budget = min(self._budget + self.rate * seconds, self.rate * 5 * SLICE_SECONDS)
        while self._budget >= 1 and len(self.sockets) < self.held:
            self._budget -= 1
            self._open(selector)

    def _open(self, selector: selectors.BaseSelector) -> None:
        number = self.counts["opened"]
        self.counts["opened"] += 1
        peer = socket.socket()
        peer.setblocking(False)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        peer.bind((f"127.9.{number % ADDRESSES}.1", 0))
        result = peer.connect_ex(("127.0.0.1", self._port))
        if result not in (0, errno.EINPROGRESS):
            self.counts[errno.errorcode.get(result, "other")] += 1
            peer.close()
            return
        self.sockets[peer] = Plain(self._words) if self._tls is None else Shaking(self._words, self._tls)
        selector.register(peer, selectors.EVENT_WRITE, self)

    def event(self, peer: socket.socket, events: int, selector: selectors.BaseSelector) -> None:
        """It is connected, has an answer, or was ended."""
        stranger = self.sockets[peer]
        try:
            if events & selectors.EVENT_WRITE:
                said = stranger.first()
                if said:
                    peer.send(said)
                selector.modify(peer, selectors.EVENT_READ, self)
                return
            heard = peer.recv(65536)
            if heard:
                said, answer = stranger.hears(heard)
                if said:
                    peer.send(said)
                if answer:
                    self.counts[answer[9:12].decode("ascii", "replace")] += 1
                return
        except OSError:  # of ssl, too
            pass
        self.counts["ended"] += 1
        self.leave(peer, selector)

    def leave(self, peer: socket.socket, selector: selectors.BaseSelector) -> None:
        selector.unregister(peer)
        del self.sockets[peer]
        peer.close()


def crowds(port: int, half: int, idle: int, wrong: int, with_tls: bool) -> list[Crowd]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if with_tls else None
    if tls is not None:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return [
        Crowd("half_open", port, b"" if with_tls else HALF, half, half, tls),
        Crowd("idle", port, b"", idle, idle, None),
        Crowd("wrong_token", port, WRONG, wrong, wrong, tls),
    ]


def main() -> None:
    port, half, idle, wrong = map(int, sys.argv[1:5])
    give_way()
    all_crowds = crowds(port, half, idle, wrong, "tls" in sys.argv[5:])
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    is_on, last, began, spent = False, time.monotonic(), 0.0, 0.0
    while True:
        now = time.monotonic()
        if is_on:
            for crowd in all_crowds:
                crowd.come(now - last, selector)
        last = now
        for key, events in selector.select(SLICE_SECONDS if is_on else None):
            if key.data is not None:
                key.data.event(key.fileobj, events, selector)
                continue
            order = sys.stdin.readline().strip()
            if order == "on":
                is_on, began, last, spent = True, time.monotonic(), time.monotonic(), time.process_time()
                for crowd in all_crowds:
                    crowd.counts.clear()
                print(json.dumps({"on": True}), flush=True)
            elif order == "off":
                is_on = False
                told = {crowd.name: {"at_once": len(crowd.sockets), **crowd.counts} for crowd in all_crowds}
                for crowd in all_crowds:
                    for peer in list(crowd.sockets):
                        crowd.leave(peer, selector)
                own = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - spent}
                print(json.dumps({**own, **told}), flush=True)
            else:
                return
            break  # what else was found is of those who have left, or is found again


if __name__ == "__main__":
    main()
