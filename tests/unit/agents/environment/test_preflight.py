"""What an agent looks at: on this machine, and on hosts as they are found elsewhere."""

import os
import time
from pathlib import Path

import pytest
from weightsync.agents.environment import preflight as module
from weightsync.agents.environment.links import Interface
from weightsync.agents.environment.preflight import Surroundings, checks, preflight
from weightsync.agents.memory.nic import Gpu
from weightsync.agents.transport.nixl.loader import environment
from weightsync.orchestrator.protocol.edges import FilesystemSettings, NixlSettings
from weightsync.orchestrator.protocol.findings import Finding

PORTS = (
    Interface("mlx5_0:1", rdma=True, up=True, state="ACTIVE", layer="InfiniBand"),
    Interface("mlx5_1:1", rdma=True, up=False, state="DOWN", layer="InfiniBand"),
    Interface("eth0", rdma=False, up=True, state="up"),
)
GPUS = (Gpu("GPU-0", "0000:f1:00.0"), Gpu("GPU-1", "0000:f2:00.0"))
"""Which no sysfs here has."""


def told(around: Surroundings, settings: NixlSettings | None = None) -> dict[str, list[str]]:
    """Levels of what is found, by what was looked at."""
    found: dict[str, list[str]] = {}
    for _, look in checks(around, settings or NixlSettings()):
        for finding in look():
            found.setdefault(finding.check, []).append(finding.level)
    return found


def test_this_process_in_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self,sm")
    preflight("engine", None, NixlSettings())  # what is read for the first time
    began = time.thread_time()
    found = preflight("engine", None, NixlSettings())
    assert time.thread_time() - began < 0.1
    assert Finding("note", "UCX_TLS=tcp,self,sm: only these transports are used", "unset UCX_TLS", "UCX_TLS") in found
    assert not [finding for finding in found if "could not be looked at" in finding.what]


def test_by_way_of_files_none_of_it_matters() -> None:
    assert preflight("trainer", 0, FilesystemSettings("/run")) == []


def test_what_is_lent_to_an_agent_that_is_being_made_is_not_the_processs_own() -> None:
    with environment({"UCX_NET_DEVICES": "mlx5_9:1"}):
        assert os.environ["UCX_NET_DEVICES"] == "mlx5_9:1"
    assert "UCX_NET_DEVICES" not in {finding.check for finding in preflight("trainer", None, NixlSettings())}


def test_an_engines_expandable_segments_and_what_its_ucx_lacks() -> None:
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "UCX_TLS": "rc,tcp", "UCX_MAX_RMA_RAILS": "4"}
    found = told(Surroundings("engine", environ, GPUS, PORTS, own=1))
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == ["warning"]
    assert found["UCX_TLS"] == ["error"]
    assert found["UCX_MAX_RMA_RAILS"] == ["note"]
    assert found["mlx5_1:1"] == ["note"]
    assert found["GPU 1"][0] == "warning", "not in this machine's sysfs"
    assert "GPU 0" not in found, "another rank's"
    assert told(Surroundings("engine", environ, (), PORTS, own=0))["UCX_TLS"] == ["error"]
    assert told(Surroundings("trainer", environ, GPUS, PORTS))["PYTORCH_CUDA_ALLOC_CONF"] == ["note"]


@pytest.mark.parametrize(
    ("gpus", "settings", "wrong"),
    [
        (GPUS, NixlSettings(), "is preset, and agents go by their GPU's nearest ports instead"),
        ((), NixlSettings(net_devices=("eth0",)), "is preset, and agents go by the daemon's transport.net_devices"),
        ((), NixlSettings(), "names mlx5_1:1, which is DOWN"),
    ],
)
def test_preset_devices_and_who_overrides_them(gpus: tuple[Gpu, ...], settings: NixlSettings, wrong: str) -> None:
    around = Surroundings("trainer", {"UCX_NET_DEVICES": "mlx5_1:1"}, gpus, PORTS)
    found = [finding.what for _, look in checks(around, settings) for finding in look()]
    assert sum(wrong in what for what in found) == 1
    assert sum("UCX_NET_DEVICES" in what for what in found) == 1


def test_a_check_that_breaks_is_told_and_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks() -> list[Interface]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "links", breaks)
    [found] = preflight("trainer", None, NixlSettings())
    assert (found.level, found.check) == ("warning", "environment")
    assert found.what == "could not be looked at: PermissionError: [Errno 13] Permission denied"
