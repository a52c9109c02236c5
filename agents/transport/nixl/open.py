"""The NIXL endpoint of an agent, made on the agent's own thread, and which network devices it may use."""

import logging

import torch
from weightsync.agents.memory.cuda import Runtime
from weightsync.agents.memory.nic import NicError, chosen_devices, net_devices
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.messages import NixlSettings

log = logging.getLogger(__name__)


def open_endpoint(name: str, settings: NixlSettings, device: torch.device) -> NixlEndpoint:
    """An endpoint for arenas on ``device``.

    CUDA's current device belongs to a thread, and UCX asks for it; so it is set here, where all NIXL calls are made.

    Raises:
        MemoryPlacementError: the device cannot be used.
        NetDeviceMissing: this host has no such network device as the settings name.
        NixlError: see ``NixlEndpoint``.
    """
    index = bind(device) if device.type == "cuda" else None
    ports = chosen_devices(settings.net_devices) if settings.net_devices else None
    if index is not None:
        try:
            ports = net_devices(index, wanted=settings.net_devices) or ports
        except NicError as error:
            log.warning("%s: UCX chooses the ports itself: %s", name, error)
    gpu = str(torch.cuda.get_device_properties(device).uuid) if index is not None else ""
    return NixlEndpoint(name, settings, net_devices=ports, gpu=gpu)


def bind(device: torch.device) -> int:
    """Make the CUDA ``device`` the calling thread's; its index. Also for a thread that takes an open endpoint over.

    Raises:
        MemoryPlacementError: the device cannot be used.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    Runtime().bind(index)
    return index
