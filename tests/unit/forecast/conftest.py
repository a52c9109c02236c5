"""What the forecast's tests share."""

import msgspec
import pytest
from layouts import Builder
from weightsync.orchestrator.planner import Party, make_plan
from weightsync.orchestrator.protocol.layout import Note, Tensor
from weightsync.orchestrator.protocol.names import Member

MIB = 1 << 20


@pytest.fixture
def plan():
    """Two sources with a layer each, and two engines; 1 MiB matrices go straight, norms of 512 bytes are packed."""
    sources, layers = [], []
    for rank in range(2):
        builder = Builder(Member("trainer", "", rank), 1 << 16)
        layer = [Tensor(f"model.layers.{rank}.w", "bfloat16", (512, 1024))]
        layer += [Tensor(f"model.layers.{rank}.norms.{i}.weight", "float32", (128,)) for i in range(4)]
        for tensor in layer:
            builder.dense((tensor, ((0,) * len(tensor.shape), tensor.shape)))
        party = builder.party()
        notes = (Note(0, 1, "sharded", "stands alone"), Note(1, 5, "gathered", f"512 bytes; rank {rank} has it"))
        layout = msgspec.structs.replace(party.layout, notes=notes)
        sources.append(Party(party.member, 1, layout))
        layers.append(layer)
    targets = []
    for engine in "ab":
        builder = Builder(Member("inference", engine, 0), 1 << 16)
        for tensor in (*layers[0][::-1], *layers[1][::-1]):
            builder.dense((tensor, ((0,) * len(tensor.shape), tensor.shape)))
        targets.append(builder.party())
    return make_plan(sources, targets)
