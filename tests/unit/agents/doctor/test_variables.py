"""Environments as they are found, with and without each trap."""

from pathlib import Path

import pytest
from engine_places import place, token_file
from weightsync.agents.doctor import variables
from weightsync.agents.doctor.links import Interface
from weightsync.agents.inference.place import place_of

LINKS = (
    Interface("mlx5_0:1", rdma=True, up=True, state="ACTIVE"),
    Interface("mlx5_1:1", rdma=True, up=False, state="DOWN"),
    Interface("eth0", rdma=False, up=True, state="up"),
)


@pytest.mark.parametrize(
    ("environ", "wrong"),
    [
        ({}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128, expandable_segments: true"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False),
    ],
)
def test_expandable_segments(environ: dict[str, str], wrong: bool) -> None:
    assert [finding.level for finding in variables.allocator(environ)] == (["warning"] if wrong else [])


@pytest.mark.parametrize(
    ("tls", "gpus", "level"),
    [
        (None, 8, None),
        ("all", 8, None),
        ("tcp,self,sm", 8, "error"),
        ("^cuda", 8, "error"),
        ("^cuda_copy", 8, "error"),
        ("tcp,cuda_copy", 8, "warning"),
        ("^cuda_ipc", 8, "warning"),
        ("rc,cuda", 8, "note"),
        ("^tcp", 8, "note"),
        ("rc,cuda_copy,cuda_ipc", 8, "note"),
        ("tcp,self,sm", 0, "note"),
    ],
)
def test_ucx_without_cuda_or_cuda_ipc(tls: str | None, gpus: int, level: str | None) -> None:
    environ = {} if tls is None else {"UCX_TLS": tls}
    assert [finding.level for finding in variables.transports(environ, gpus)] == ([] if level is None else [level])


@pytest.mark.parametrize(
    ("text", "pinned", "levels"),
    [
        (None, True, []),
        ("all", True, []),
        ("mlx5_0:1", False, []),
        ("mlx5_0:1", True, ["note"]),
        ("mlx5_1:1", False, ["error"]),
        ("mlx5_7:1,mlx5_1:1", True, ["error", "error", "note"]),
    ],
)
def test_preset_net_devices(text: str | None, pinned: bool, levels: list[str]) -> None:
    environ = {} if text is None else {"UCX_NET_DEVICES": text}
    assert [finding.level for finding in variables.net_devices(environ, LINKS, pinned)] == levels


def test_the_loopback_alone() -> None:
    links = (*LINKS, Interface("lo", rdma=False, up=True, state="unknown", loopback=True))
    [found] = variables.net_devices({"UCX_NET_DEVICES": "lo"}, links, pinned=False)
    assert (found.level, found.what) == ("warning", "UCX_NET_DEVICES=lo: no other host can be reached")


def test_preset_rails() -> None:
    assert list(variables.rails({})) == []
    assert [f.check for f in variables.rails({"UCX_MAX_RMA_RAILS": "4"})] == ["UCX_MAX_RMA_RAILS"]


@pytest.mark.parametrize(
    ("environ", "checks"),
    [
        ({"VLLM_SERVER_DEV_MODE": "1"}, []),
        ({"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "lora,weightsync"}, []),
        ({}, ["VLLM_SERVER_DEV_MODE"]),
        ({"VLLM_SERVER_DEV_MODE": "0"}, ["VLLM_SERVER_DEV_MODE"]),
        ({"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": ""}, ["VLLM_PLUGINS"]),
        ({"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "lora, weightsync"}, ["VLLM_PLUGINS"]),
    ],
)
def test_an_engines_environment(environ: dict[str, str], checks: list[str]) -> None:
    found = list(variables.engine(environ, "weightsync"))
    assert [finding.check for finding in found] == checks
    assert {finding.level for finding in found} <= {"error"}


def test_what_stands_before_the_admin_routes(tmp_path: Path) -> None:
    good = place(token_file(tmp_path), "wss://head:7410/agents", "glm", "a0")

    def told(**more: str) -> list[tuple[str, str]]:
        environ = good | more
        return [(each.level, each.check) for each in variables.guard(environ, place_of(environ))]

    assert told() == []
    here = {"WEIGHTSYNC_HUB_URL": "ws://127.0.0.1:7410/agents"}
    assert told(**here) == []
    assert told(**here, WEIGHTSYNC_LOOPBACK_DEMO="1") == [("warning", "WEIGHTSYNC_LOOPBACK_DEMO")]
    assert told(WEIGHTSYNC_HUB_URL="ws://head:7410/agents") == [("note", "WEIGHTSYNC_HUB_URL")]
    opened = told(WEIGHTSYNC_PUBLIC_ROUTES="/mine", WEIGHTSYNC_ALLOW_CALLS="mine")
    assert opened == [("note", "WEIGHTSYNC_PUBLIC_ROUTES"), ("note", "WEIGHTSYNC_ALLOW_CALLS")]
