"""Environments as they are found, with and without each trap."""

import pytest
from weightsync.agents.environment import variables
from weightsync.agents.environment.links import Interface

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
    assert [finding.level for finding in variables.allocator(environ, "engine")] == (["warning"] if wrong else [])
    assert [finding.level for finding in variables.allocator(environ, "trainer")] == (["note"] if wrong else [])


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
        ("mlx5_7:1,mlx5_1:1", False, ["error", "error"]),
        ("mlx5_7:1,mlx5_1:1", True, ["note"]),
        ("mlx5_*", False, []),
        ("mlx4_*", False, ["error"]),
        ("^eth0", False, []),
        ("^mlx5_7:1", False, []),
    ],
)
def test_preset_net_devices(text: str | None, pinned: bool, levels: list[str]) -> None:
    environ = {} if text is None else {"UCX_NET_DEVICES": text}
    assert [finding.level for finding in variables.net_devices(environ, LINKS, "others" if pinned else "")] == levels


def test_the_loopback_alone() -> None:
    links = (*LINKS, Interface("lo", rdma=False, up=True, state="unknown", loopback=True))
    for text in ("lo", "l*", "^eth0,mlx5_*"):
        [found] = variables.net_devices({"UCX_NET_DEVICES": text}, links)
        assert (found.level, found.what) == ("warning", f"UCX_NET_DEVICES={text}: no other host can be reached")
        assert found.several_hosts


def test_preset_rails() -> None:
    assert list(variables.rails({})) == []
    assert [f.check for f in variables.rails({"UCX_MAX_RMA_RAILS": "4"})] == ["UCX_MAX_RMA_RAILS"]
