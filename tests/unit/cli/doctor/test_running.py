"""The running daemon: real HTTP, real locks, real mounts."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from servers_here import only, served
from weightsync.orchestrator.cli.doctor import running
from weightsync.orchestrator.daemon.access.descriptors import reachable
from weightsync.orchestrator.daemon.admin.views import ProblemView, StatusView
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.settings.settings import Settings, load

VIEW = StatusView(
    run="glm",
    state="waits",
    epoch=3,
    problems=(
        ProblemView(severity="critical", what="no engine serves", fix="publish"),
        ProblemView(severity="degraded", what="a: unreachable"),
    ),
)


def telling(view: StatusView | bytes, status: int = 200) -> web.Application:
    async def tell(_: web.Request) -> web.Response:
        body = view if isinstance(view, bytes) else msgspec.json.encode(view)
        return web.Response(body=body, status=status, content_type="application/json")

    return only(status=tell)


def at(config: Path, url: str) -> Settings:
    return load(config, {"WEIGHTSYNC__ADVERTISE_URL": url})


async def test_a_daemon_and_what_it_says_is_wrong(config: Path) -> None:
    async with served(telling(VIEW)) as url:
        found = await running.daemon(at(config, url), 5)
    assert [(f.level, f.check) for f in found] == [("ok", "daemon"), ("error", "status"), ("warning", "status")]
    assert found[1].fix == "publish"


async def test_no_daemon_is_a_note(config: Path) -> None:
    [found] = await running.daemon(load(config, {}), 5)
    assert found.level == "note"


@pytest.mark.parametrize(
    ("app", "text"),
    [
        (telling(b"", 401), "refuses the token"),
        (telling(b"{}"), "is not answered as the daemon answers it"),
        (telling(StatusView(run="other", state="")), "is the daemon of run 'other'"),
    ],
)
async def test_another_daemon_or_none(config: Path, app: web.Application, text: str) -> None:
    async with served(app) as url:
        [found] = await running.daemon(at(config, url), 5)
    assert found.level == "error"
    assert text in found.what


async def test_it_is_not_asked_without_a_token_or_authority(config: Path) -> None:
    [found] = await running.daemon(load(config, {"WEIGHTSYNC__CREDENTIALS": str(config.parent / "none")}), 5)
    assert (found.level, found.fix) == ("note", "run doctor as the daemon's user")
    assert found.what.startswith("not asked: ")
    tls = "{certificate_file: none.pem, key_file: none.key, ca_file: none.pem}"
    [found] = await running.daemon(load(config, {"WEIGHTSYNC__LISTEN__TLS": tls}), 5)
    assert (found.level, "none.pem" in found.what) == ("note", True)


async def test_the_wrong_role_is_told(config: Path) -> None:
    async def tell(_: web.Request) -> web.Response:
        return web.Response(status=403, text="this needs the credential of role viewer\n")

    async with served(only(status=tell)) as url:
        [found] = await running.daemon(at(config, url), 5)
    assert (found.level, found.what) == (
        "error", f"{url}/status refuses the token: this needs the credential of role viewer"
    )  # fmt: skip


def test_the_daemon_is_who_has_the_lock_open(config: Path) -> None:
    settings = load(config, {})
    assert running.daemon_pid(settings) is None
    settings.state_directory.mkdir()
    with Journal.open(settings.journal_path):
        assert running.daemon_pid(settings) == os.getpid()
    assert running.daemon_pid(settings) is None  # the file still has our number, and we have it open no more


@contextlib.contextmanager
def in_a_namespace(directory: Path) -> Iterator[int]:
    """A process for which ``directory`` is read-only; its number."""
    script = f"mount -t tmpfs -o ro none '{directory}' && echo ready && read _"
    child = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        if child.stdout.readline() != b"ready\n":
            pytest.skip("this kernel lets nobody have mounts of their own")
        yield child.pid
        child.terminate()


def test_a_directory_that_is_read_only_in_the_daemons_sandbox(tmp_path: Path) -> None:
    mine, ours = tmp_path / "mine", tmp_path / "ours"
    mine.mkdir()
    ours.mkdir()
    with in_a_namespace(mine) as pid:
        root = running.PROC / str(pid) / "root"
        [found] = running.sandbox(root, {"run.directory": mine, "state_directory": ours})
    assert (found.level, found.check, found.fix.partition("=")[0]) == ("error", "run.directory", "add ReadWritePaths")
    assert os.access(mine, os.W_OK)  # as a shell beside it believes


def test_a_directory_that_is_not_in_the_daemons_container(tmp_path: Path) -> None:
    [found] = running.sandbox(tmp_path, {"run.directory": Path("/data/run")})
    assert (found.level, found.what) == ("error", "/data/run is not there for the running daemon")


def test_open_files() -> None:
    [few] = running.open_files(1024, agents=4096, engines=512)
    assert (few.level, few.fix.partition(" ")[0]) == ("error", "LimitNOFILE=65536")
    assert [f.level for f in running.open_files(65536, 4096, 512)] == ["ok"]
    assert [f.level for f in running.open_files(-1, 4096, 512)] == ["ok"]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert running.file_limit(os.getpid()) == (-1 if soft == resource.RLIM_INFINITY else soft)
    assert running.file_limit(None) == reachable() >= soft, "the daemon raises its own when it starts"
