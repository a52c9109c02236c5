"""The NIXL endpoint of an agent, made on the agent's own thread and pinned to its device's nearest ports."""

import logging

import torch
from weightsync.agents.memory.cuda import Runtime
from weightsync.agents.memory.nic import NicError, net_devices
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.messages import NixlSettings

log = logging.getLogger(__name__)


def open_endpoint(name: str, settings: NixlSettings, device: torch.device) -> NixlEndpoint:
    """An endpoint for arenas on ``device``.

    CUDA's current device belongs to a thread, and UCX asks for it; so it is set here, where all NIXL calls are made.

    Raises:
        MemoryPlacementError: the device cannot be used.
        NixlError: see ``NixlEndpoint``.
    """
    if device.type != "cuda":
        return NixlEndpoint(name, settings)
    try:
        ports = net_devices(bind(device))
    except NicError as error:
        log.warning("%s: UCX chooses the ports itself: %s", name, error)
        ports = None
    return NixlEndpoint(name, settings, net_devices=ports, gpu=str(torch.cuda.get_device_properties(device).uuid))


def bind(device: torch.device) -> int:
    """Make the CUDA ``device`` the calling thread's; its index. Also for a thread that takes an open endpoint over.

    Raises:
        MemoryPlacementError: the device cannot be used.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    Runtime().bind(index)
    return index
