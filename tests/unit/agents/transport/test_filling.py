"""How far a conversion is, as its two threads see it."""

import threading

import torch
from weightsync.agents.transport.filling import ALL, Filling, whole
from weightsync.orchestrator.protocol.names import Version


async def test_what_one_thread_has_reached_the_other_one_sees() -> None:
    filling = Filling(Version(7, 2), torch.device("cpu"))
    assert filling.filled() == 0
    for offset in (64, 128):
        thread = threading.Thread(target=filling.reached, args=(offset,))
        thread.start()
        thread.join()
    assert filling.filled() == 128
    assert not filling.ended.done()
    assert filling.filled() < whole() == ALL


class Later:
    """A mark on a device's stream, which has not come to it."""

    def __init__(self) -> None:
        self.over = False

    def reached(self) -> bool:
        return self.over


async def test_what_the_device_has_not_done_is_not_filled() -> None:
    filling = Filling(Version(7, 2), torch.device("cpu"))
    marks = [Later(), Later()]
    filling._marks.extend(zip((64, 128), marks, strict=True))  # type: ignore[arg-type]
    assert filling.filled() == 0
    marks[1].over = True
    assert filling.filled() == 0, "in their order"
    marks[0].over = True
    assert filling.filled() == 128
