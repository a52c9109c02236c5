"""The other end of the data plane, as a process of its own: ``nixl_peer.py BYTES``.

Prints one JSON line with its endpoint name, card (hex) and region, then polls until its standard input closes,
answering each line on it: ``digest`` with the SHA-256 of its memory, ``clear`` after zeroing it, ``sever`` after
breaking its connections.
"""

import hashlib
import json
import os
import select
import socket
import sys
from contextlib import suppress

import numpy as np
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.messages import NixlSettings


def main() -> None:
    memory = np.ones(int(sys.argv[1]), dtype=np.uint8)
    variables = {"UCX_TLS": os.environ["PEER_TLS"]} if "PEER_TLS" in os.environ else {}
    endpoint = NixlEndpoint("peer", NixlSettings(), variables=variables)
    region = Region(memory.ctypes.data, memory.nbytes)
    endpoint.register([region])
    card = endpoint.metadata().hex()
    print(json.dumps({"name": endpoint.name, "card": card, "base": region.base, "length": region.length}), flush=True)
    while True:
        endpoint.poll()
        ready, _, _ = select.select([sys.stdin], [], [], 0.001)
        if not ready:
            continue
        match sys.stdin.readline().strip():
            case "digest":
                print(hashlib.sha256(memory).hexdigest(), flush=True)
            case "clear":
                memory[:] = 0
                print("cleared", flush=True)
            case "sever":
                sever()
                print("severed", flush=True)
            case "":
                break
    endpoint.close()


def sever() -> None:
    """Shut every connected TCP socket of this process down; those that listen stay."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
            if one.family == socket.AF_INET and one.getpeername():
                one.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
