"""An end of the data plane that one peer of does not answer: ``apart_writer.py NAME CARD``, the card in hex.

Connects to that peer and to one in its own process, polls until the latter has taken the first word, and prints one
JSON line: ``longest``, the seconds that the longest call on an endpoint took; ``far``, whether the peer has taken it.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.messages import NixlSettings


def main() -> None:
    far, card = sys.argv[1:]
    writer, near = NixlEndpoint("writer", NixlSettings()), NixlEndpoint("near", NixlSettings())
    took = []

    def timed(call: Callable[..., Any], *arguments: object) -> Any:
        began = time.monotonic()
        try:
            return call(*arguments)
        finally:
            took.append(time.monotonic() - began)

    timed(writer.connect, far, bytes.fromhex(card))
    timed(writer.connect, near.name, near.metadata())
    while not timed(writer.warm, near.name):
        timed(writer.poll)
        timed(near.poll)
    print(json.dumps({"longest": max(took), "far": timed(writer.warm, far)}), flush=True)


if __name__ == "__main__":
    main()
