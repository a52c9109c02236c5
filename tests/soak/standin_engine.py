"""A stand-in engine that judges itself: before it serves a version, every byte is compared; a wrong one ends it.

Its memory is that of ``tiny_fleet.Target``. Arguments: name, port.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence

import counts
import torch
from soak_model import masters
from standin import Dense, Engine, serve
from tiny_fleet import Target
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.names import Version

HOST = "127.0.0.1"
WRONG_BYTES = 3
"""Exit code."""


class Memory(Dense):
    """A ``standin.Model``."""

    def __init__(self, target: Target) -> None:
        self._target = target

    @property
    def layout(self) -> Layout:
        return self._target.layout

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        return self._target.memory

    def step(self) -> None:
        """It reads when it is resumed."""

    def resumed(self, applied: Version) -> None:
        try:
            self._target.check(masters(applied.step))
        except AssertionError:
            print(f"step {applied.step}: the memory holds something else", flush=True)
            os._exit(WRONG_BYTES)


def main(kind: type[Engine] = Engine) -> None:
    name, port = sys.argv[1:]
    counts.install()
    torch.set_num_threads(1)
    engine = kind(Memory(Target.of(name, 0, staging=0)))
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=engine.end).start())
    serve(engine, HOST, int(port))
    engine.run()


if __name__ == "__main__":
    main()
