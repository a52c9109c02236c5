"""The endpoint's parts that need no peer: loader, environment, chunks, and the look at the memory map."""

import importlib
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsync.agents.transport.nixl import loader as nixl_loader
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import NixlMissingError
from weightsync.agents.transport.nixl.loader import connecting, environment, only_networks
from weightsync.orchestrator.protocol.messages import NixlSettings


# --------------------------------------------------------------------------------------------------------- loader
@pytest.fixture
def fresh_loader() -> Iterator[None]:
    nixl_loader.load.cache_clear()
    yield
    nixl_loader.load.cache_clear()


@pytest.mark.usefixtures("fresh_loader")
@pytest.mark.parametrize("present", [["nixl", "nixl_cu12"], ["nixl_cu13", "nixl_cu12"], ["nixl_cu12"]])
def test_the_first_package_that_imports_is_taken(monkeypatch: pytest.MonkeyPatch, present: list[str]) -> None:
    def find(name: str) -> types.ModuleType:
        package, _, part = name.partition(".")
        if package not in present or part != "_api":
            raise ModuleNotFoundError(f"No module named {package!r}")
        module = types.ModuleType(name)
        module.nixlBind = types.ModuleType("bindings")  # type: ignore[attr-defined]
        return module

    monkeypatch.setattr(importlib, "import_module", find)
    assert nixl_loader.load().package == present[0]


@pytest.mark.usefixtures("fresh_loader")
def test_without_nixl_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> types.ModuleType:
        raise ImportError("libucp.so: cannot open")

    monkeypatch.setattr(importlib, "import_module", nothing)
    with pytest.raises(NixlMissingError, match="nixl, nixl-cu13 or nixl-cu12") as caught:
        nixl_loader.load()
    assert "libucp.so" in str(caught.value)
    assert not caught.value.retry


def test_the_bindings_know_the_error_types() -> None:
    bindings = nixl_loader.load()
    assert bindings.disconnected in bindings.errors
    assert len(bindings.errors) >= 10


@pytest.mark.parametrize("file", ["", "ucx.log"])
def test_what_ucx_has_to_say_is_no_output_of_its_host(file: str, tmp_path: Path) -> None:
    """It says it on stdout by itself; a file that somebody has named is where it goes."""
    make = "load().agent('a', backends=('UCX',), progress_thread=False, threads=0)"
    program = f"from weightsync.agents.transport.nixl.loader import load; agent = {make}"
    named = {"UCX_LOG_FILE": str(tmp_path / file)} if file else {}
    plain = {name: value for name, value in os.environ.items() if name != "UCX_LOG_FILE"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=plain | named | {"UCX_LOG_LEVEL": "info"},
    )
    told = (tmp_path / file).read_text() if file else done.stderr
    assert "UCX  INFO" in told
    assert done.stdout == ""


# ---------------------------------------------------------------------------------------------------- environment
def test_the_environment_is_put_back_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_9:1")
    monkeypatch.setenv("UCX_LOG_LEVEL", "error")
    monkeypatch.delenv("UCX_TLS", raising=False)
    before = dict(os.environ)
    seen: dict[str, str] = {}

    def make() -> None:
        with environment({"UCX_NET_DEVICES": "mlx5_0:1", "UCX_TLS": "tcp", "UCX_LOG_LEVEL": None}):
            seen.update(os.environ)
            raise RuntimeError("no agent")

    with pytest.raises(RuntimeError, match="no agent"):
        make()
    assert seen["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert seen["UCX_TLS"] == "tcp"
    assert "UCX_LOG_LEVEL" not in seen
    assert dict(os.environ) == before


def test_agents_are_made_one_at_a_time() -> None:
    inside, leave, second = threading.Event(), threading.Event(), []

    def first() -> None:
        with environment({"WEIGHTSYNC_TEST": "first"}):
            inside.set()
            leave.wait(10)

    def other() -> None:
        with environment({"WEIGHTSYNC_TEST": "second"}):
            second.append(os.environ["WEIGHTSYNC_TEST"])

    threads = [threading.Thread(target=first), threading.Thread(target=other)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    assert os.environ["WEIGHTSYNC_TEST"] == "first"
    leave.set()
    for thread in threads:
        thread.join(10)
    assert second == ["second"]
    assert "WEIGHTSYNC_TEST" not in os.environ


def test_our_settings_reach_our_agent_and_no_other_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transports an agent offers show in the size of its card: a TCP-only one is shorter. A second agent of the
    process, as vLLM's KV connector has one, keeps what its own environment says."""
    monkeypatch.delenv("UCX_TLS", raising=False)

    def foreign() -> int:
        bindings = nixl_loader.load()
        agent = bindings.agent("foreign", backends=("UCX",), progress_thread=False, threads=0)
        return len(agent.get_agent_metadata())

    before = foreign()
    ours = NixlEndpoint("writer", NixlSettings(), net_devices="lo", variables={"UCX_TLS": "tcp"})
    assert foreign() == before
    free = NixlEndpoint("writer", NixlSettings())
    assert len(ours.metadata()) < len(free.metadata())
    assert "UCX_TLS" not in os.environ
    ours.close()
    free.close()


@pytest.mark.parametrize(
    ("transports", "only"),
    [("tcp", True), ("tcp,self", True), ("rc_x,ud_mlx5,self,cuda_copy", True)]
    + [(other, False) for other in ("", "all", "^sm", "tcp,sm", "tcp,cma", "rc,cuda_ipc", "tcp,self,unheard_of")],
)
def test_which_transports_share_no_memory(transports: str, only: bool) -> None:
    assert only_networks(transports) is only


# ------------------------------------------------------------------------------------------------- connecting over TCP
WITHOUT_WAITING = {"UCX_TCP_CONN_NB": "y", "UCX_TCP_SYN_CNT": "4"}


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, WITHOUT_WAITING),
        ({"UCX_TLS": "all", "UCX_NET_DEVICES": "all"}, WITHOUT_WAITING),
        ({"UCX_TLS": "rc,cuda_ipc,tcp", "UCX_NET_DEVICES": "mlx5_0:1,lo"}, WITHOUT_WAITING),
        ({"UCX_TLS": "^ib", "UCX_NET_DEVICES": "l*"}, WITHOUT_WAITING),
        ({"UCX_TCP_SYN_CNT": "7", "UCX_TCP_CONN_NB": "n"}, WITHOUT_WAITING | {"UCX_TCP_SYN_CNT": "7"}),
        ({"UCX_TLS": "rc,cuda_ipc"}, {}),
        ({"UCX_TLS": "^tcp,rc"}, {}),
        ({"UCX_NET_DEVICES": "mlx5_0:1"}, {}),
    ],
)
def test_where_ucx_may_use_tcp_it_does_not_wait_for_an_address(environ: dict[str, str], told: dict[str, str]) -> None:
    assert connecting(environ) == told
