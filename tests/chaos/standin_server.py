"""A stand-in engine that is its own witness: each step writes a line, "<monotonic seconds> <sha256>", to the file SAID.

Arguments: host, port, config.json of the model, SAID.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from standin import Dense, Engine, serve
from tiny_models import model_shapes
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.orchestrator.protocol.layout import Layout, Tensor, row
from weightsync.orchestrator.protocol.names import Version


class Memory(Dense):
    """All tensors of the checkpoint, bfloat16 and dense in one region, in the order of their names; a ``Model``."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], said: Path) -> None:
        tensors, rows, offset = [], [], 0
        for name, shape in sorted(shapes.items()):
            strides = (2 * shape[1], 2) if len(shape) == 2 else (2,)
            rows.append(row(len(tensors), 0, offset, (0,) * len(shape), shape, strides))
            tensors.append(Tensor(name, "bfloat16", shape))
            offset += 2 * int(np.prod(shape))
        self.tensors = (host_arena(offset).zero_(),)
        self.layout = Layout(tuple(tensors), (region_of(self.tensors[0]),), np.array(rows, dtype="<i8").tobytes())
        self._said = said.open("a", buffering=1)

    def step(self) -> None:
        self._said.write(f"{time.monotonic():.4f} {hashlib.sha256(self.tensors[0].numpy()).hexdigest()}\n")

    def resumed(self, applied: Version) -> None:
        """The next step says it."""


def main() -> None:
    host, port, config, said = sys.argv[1:]
    engine = Engine(Memory(model_shapes(json.loads(Path(config).read_text())), Path(said)))
    serve(engine, host, int(port))
    engine.run()


if __name__ == "__main__":
    main()
