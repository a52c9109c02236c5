"""Which implementation serves a device: Triton on CUDA, the reference elsewhere."""

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import torch
from weightsync.kernels.errors import KernelUnavailableError

LOOK_SECONDS: Final = 0.0001
"""Between two looks at whether a device is done."""

Beside = Literal["batches", "wire"]
"""What a kernel runs beside and must not hold up."""

INTERPRETED_PROGRAMS: Final = 3
"""Fewer than most tables have jobs, so that each program does several."""


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for (``TRITON_INTERPRET=1``), which runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(device: torch.device) -> bool:
    """Whether tensors on ``device`` go through the Triton kernels.

    Raises:
        KernelUnavailableError: the device is CUDA and Triton cannot be imported.
    """
    if device.type != "cuda" and not interpreting():
        return False
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KernelUnavailableError(
            f"weights on {device} need Triton: pip install 'weightsync-orchestrator[kernels]'"
        ) from error
    return True


def common_device(tensors: "list[torch.Tensor]") -> torch.device:
    """The one device that all ``tensors`` are on (the CPU when there are none).

    Raises:
        ValueError: they are on different devices.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors of one call are on different devices: {sorted(map(str, devices))}")
    return devices.pop() if devices else torch.device("cpu")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches inside go to ``device``'s current stream, whatever device the caller is on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def programs_beside(beside: Beside, device: torch.device) -> int:
    """How many programs of a persistent kernel leave ``device`` to what they run beside.

    Beside batches, one for every other multiprocessor: programs enough for all keep each from others until they end,
    and steps of a dense model took 23 instead of 13 ms while 15 GB were scattered and digested. Half of an H100 does
    that as fast as NVLink brings it; a fifth does not.

    Beside a wire, two for each: they keep the memory busy, and have so few requests under way that copy engines get
    their turn. With all that the device holds, conversion and digest of 15 GB were 7 and 21 % faster and slowed the
    wire, which takes longer, by 5 %.
    """
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return 2 * count if beside == "wire" else max(1, count // 2)


class StreamMark:
    """When a device has done what a stream was given.

    Who waits for that in the driver, as a copy to the host does, keeps all threads of the process from launching
    anything meanwhile: for the digest of 15 GB an engine took no step, and a trainer wrote nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """All that the device's current stream has been given so far."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def reached(self) -> bool:
        """Whether all that was marked is done; on a CPU it always is."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Until all that was marked is done."""
        while not self.reached():
            time.sleep(LOOK_SECONDS)


class StreamWork:
    """What one stream is given to do. What that reads is kept until it is done: its owner may give it back meanwhile,
    and its tables would be others' memory."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._begun: deque[tuple[StreamMark, object]] = deque()

    def begin(self, launch: Callable[[], object], reads: object) -> StreamMark:
        """Have ``launch`` start something on the stream; the mark behind it."""
        with torch.cuda.stream(self._stream):
            launch()
            mark = StreamMark(self._stream.device)
            mark.mark()
        while self._begun and self._begun[0][0].reached():
            self._begun.popleft()
        self._begun.append((mark, reads))
        return mark
