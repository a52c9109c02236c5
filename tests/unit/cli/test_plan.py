"""``plan explain`` from files and from a daemon, ``plan simulate`` of a model, and what they say when they cannot."""

import asyncio
import threading

import msgspec
import numpy as np
import pytest
from aiohttp import web
from weightsync.orchestrator.cli.common import Exit
from weightsync.orchestrator.cli.main import main
from weightsync.orchestrator.cli.plan import Unusable, read_layouts, write_layouts
from weightsync.orchestrator.daemon.admin.views import LayoutsView, PartyView
from weightsync.orchestrator.planner import Party
from weightsync.orchestrator.protocol.layout import ROW_COLUMNS, Layout, Region, Tensor, row
from weightsync.orchestrator.protocol.names import Member

TENSOR = Tensor("model.layers.0.w", "bfloat16", (8, 8))


def party(member, tensor=TENSOR):
    rows = np.array([row(0, 0, 0, (0, 0), tensor.shape, (2 * tensor.shape[1], 2))], "<i8")
    assert rows.shape == (1, ROW_COLUMNS)
    return Party(member, 7, Layout((tensor,), (Region(0, 2 * tensor.shape[0] * tensor.shape[1]),), rows.tobytes()))


@pytest.fixture
def parties():
    return [party(Member("inference", "e", 0)), party(Member("trainer", "", 0))]


@pytest.fixture
def directory(parties, tmp_path):
    write_layouts(parties, tmp_path / "layouts")
    return tmp_path / "layouts"


def test_layout_files_come_back_as_they_were(parties, directory):
    assert read_layouts(directory) == parties
    assert read_layouts(directory / "e-0.msgpack") == parties[:1]


def test_explain_from_files(directory, capsys):
    assert main(["plan", "explain", "--from", str(directory)]) == Exit.OK
    assert "model.layers.*.w" in capsys.readouterr().out
    assert main(["plan", "explain", "--from", str(directory), "--json", "--bytes-per-second", "1e9"]) == Exit.OK
    found = msgspec.json.decode(capsys.readouterr().out)
    assert found["moved"]["direct_bytes"] == 128
    assert set(found["seconds"]) == {"asked", "same_gpu", "nvlink", "nic", "tcp", "shm"}


def test_simulate_from_files_and_of_a_model(directory, capsys):
    assert main(["plan", "simulate", "--from", str(directory), "--json"]) == Exit.OK
    assert msgspec.json.decode(capsys.readouterr().out)["bytes"] == 128
    fleet = ["--trainer-ep", "8", "--fsdp", "1", "--engines", "1", "--engine-ep", "8", "--nic-gbps", "200"]
    assert main(["plan", "simulate", "--model", "glm-5", *fleet]) == Exit.OK
    out = capsys.readouterr().out
    assert "8 trainer and 8 engine GPUs, 8 GPUs and 8 NICs of 200 Gb/s" in out
    assert "bottleneck: NIC" in out


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda d: None, "holds no *.msgpack"),
        (lambda d: (d / "a.msgpack").write_bytes(b"\x93"), "a.msgpack is no layout"),
        (lambda d: (d / "a.msgpack").write_bytes(b"\x91" * 100_000), "a.msgpack is no layout"),
        (lambda d: (d / "a.msgpack").symlink_to(d / "a.msgpack"), "a.msgpack cannot be read: Too many levels"),
        (lambda d: (d / "a.msgpack").symlink_to("/dev/zero"), "a.msgpack has more than 67108864 bytes"),
    ],
)
def test_files_that_are_none(tmp_path, write, said, capsys):
    write(tmp_path)
    assert main(["plan", "explain", "--from", str(tmp_path)]) == Exit.CONFIG
    assert said in capsys.readouterr().err


def test_what_cannot_be_planned(tmp_path, parties, capsys):
    assert main(["plan", "explain", "--from", str(tmp_path / "none.msgpack")]) == Exit.CONFIG
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(Unusable):
        read_layouts(tmp_path / "none.msgpack")
    write_layouts([parties[1], party(Member("inference", "e", 0), Tensor("other", "bfloat16", (8, 8)))], tmp_path)
    assert main(["plan", "explain", "--from", str(tmp_path)]) == Exit.CONFIG
    assert "no trainer rank holds all of 1 tensors" in capsys.readouterr().err
    assert main(["plan", "simulate", "--model", "glm-5", "--trainer-ep", "7"]) == Exit.CONFIG
    assert "256 experts are not divisible by 7" in capsys.readouterr().err


def test_neither_place_nor_configuration(capsys, monkeypatch):
    monkeypatch.delenv("WEIGHTSYNC_CONFIG", raising=False)
    assert main(["plan", "explain"]) == Exit.USAGE
    told = capsys.readouterr().err
    assert "--from PATH_OR_URL" in told
    assert "--model" not in told
    assert main(["plan", "simulate"]) == Exit.USAGE
    assert "--model" in capsys.readouterr().err


class Daemon:
    """Answers /plan/layouts to those who bear the token, on a thread of its own."""

    def __init__(self, answer):
        self.answer = answer
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self):
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _start(self):
        app = web.Application()
        app.router.add_get("/plan/layouts", self._respond)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _respond(self, request):
        if request.headers.get("Authorization") != "Bearer secret":
            return web.Response(status=401)
        return web.Response(body=self.answer)

    def stop(self):
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)


@pytest.fixture
def daemon(parties):
    views = tuple(PartyView(name=str(p.member), member=p.member, incarnation=7, layout=p.layout) for p in parties)
    found = Daemon(msgspec.json.encode(LayoutsView(run="r", root="x", parties=views)))
    yield found
    found.stop()


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.write_text("secret\n")
    path.chmod(0o600)
    return str(path)


def test_explain_of_a_running_daemon(daemon, token, capsys):
    assert main(["plan", "explain", "--from", daemon.url, "--token-file", token, "--json"]) == Exit.OK
    assert msgspec.json.decode(capsys.readouterr().out)["moved"]["direct_bytes"] == 128


def test_a_daemon_that_refuses_or_answers_nonsense(daemon, token, capsys):
    assert main(["plan", "explain", "--from", daemon.url]) == Exit.DENIED
    daemon.answer = b"{}"
    assert main(["plan", "explain", "--from", daemon.url, "--token-file", token]) == Exit.CONFIG
    assert "not the daemon's" in capsys.readouterr().err
    daemon.stop()
    assert main(["plan", "explain", "--from", daemon.url, "--token-file", token]) == Exit.TEMPORARY
