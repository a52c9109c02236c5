"""Strangers at the daemon's door, as many and as busy as they are told: a process of its own, on loopback.

Arguments: port, places that half requests hold, places that silent connections hold, wrong tokens a second. Lines of
standard input are ``on`` and ``off``; each is answered with a line of JSON, of ``off`` with what was done meanwhile.

A held place is taken again as soon as the daemon ends it, all of a kind at most once a second. They come from ADDRESSES
addresses, as strangers do who want more than the places that one address has.
"""

import errno
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable

ADDRESSES = 64
SLICE_SECONDS = 0.02
HALF = b"GET /status HTTP/1.1\r\nHost: x\r\nX-Never: "
WRONG = b"GET /status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong-%d\r\nConnection: close\r\n\r\n"
ABORT = struct.pack("ii", 1, 0)


class Crowd:
    """Strangers of one kind: ``held`` at a time, or ``rate`` a second that go when they are answered."""

    def __init__(self, name: str, port: int, say: Callable[[int], bytes], held: int, rate: float) -> None:
        self.name, self.held, self.rate = name, held, rate
        self._port, self._say = port, say
        self._budget = 0.0
        self.sockets: set[socket.socket] = set()
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
        self.sockets.add(peer)
        selector.register(peer, selectors.EVENT_WRITE, self)

    def event(self, peer: socket.socket, events: int, selector: selectors.BaseSelector) -> None:
        """It is connected, has an answer, or was ended."""
        try:
            if events & selectors.EVENT_WRITE:
                said = self._say(self.counts["opened"])
                if said:
                    peer.send(said)
                selector.modify(peer, selectors.EVENT_READ, self)
                return
            answer = peer.recv(4096)
            if answer:
                self.counts[answer[9:12].decode("ascii", "replace")] += 1
                return
        except OSError:
            pass
        self.counts["ended"] += 1
        self.leave(peer, selector)

    def leave(self, peer: socket.socket, selector: selectors.BaseSelector) -> None:
        selector.unregister(peer)
        self.sockets.discard(peer)
        peer.close()


def main() -> None:
    port, half, idle, wrong = map(int, sys.argv[1:])
    os.nice(19)  # strangers have machines of their own; here they share the daemon's
    crowds = [
        Crowd("half_open", port, lambda _: HALF, half, half),
        Crowd("idle", port, lambda _: b"", idle, idle),
        Crowd("wrong_token", port, lambda number: WRONG % number, wrong, wrong),
    ]
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    is_on, last, began = False, time.monotonic(), 0.0
    while True:
        now = time.monotonic()
        if is_on:
            for crowd in crowds:
                crowd.come(now - last, selector)
        last = now
        for key, events in selector.select(SLICE_SECONDS if is_on else None):
            if key.data is not None:
                key.data.event(key.fileobj, events, selector)
                continue
            order = sys.stdin.readline().strip()
            if order == "on":
                is_on, began, last = True, time.monotonic(), time.monotonic()
                for crowd in crowds:
                    crowd.counts.clear()
                print(json.dumps({"on": True}), flush=True)
            elif order == "off":
                is_on = False
                told = {crowd.name: {"at_once": len(crowd.sockets), **crowd.counts} for crowd in crowds}
                for crowd in crowds:
                    for peer in list(crowd.sockets):
                        crowd.leave(peer, selector)
                print(json.dumps({"seconds": time.monotonic() - began, **told}), flush=True)
            else:
                return
            break  # what else was found is of those who have left, or is found again


if __name__ == "__main__":
    main()
