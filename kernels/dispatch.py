"""Which implementation serves a device: Triton on CUDA, the reference elsewhere."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from weightsync.kernels.errors import KernelUnavailableError


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


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 in the interpreter, which runs one program at a time."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
