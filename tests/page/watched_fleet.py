"""What the page shows in its tests: a real daemon, stand-in engines, a trainer, and an engine that writes markup."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web
from fleet import Fleet, Trainer
from ports import HOST, free_port
from soak import SETTINGS, StandIn, counting
from stopping_engine import VARIABLE

HERE = Path(__file__).resolve().parent
SOAK = HERE.parent / "soak"
PATIENCE = 2
MARKUP = "<img src=x onerror=\"window.harmed='engine'\"><script>window.harmed='script'</script>"
"""What a stranger would have run in the operator's browser."""


class Hostile:
    """An engine's server that answers everything with 500 and ``says``."""

    def __init__(self, says: str) -> None:
        self._says = says
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()

    async def _serve(self) -> None:
        async def answer(_: web.Request) -> web.Response:
            return web.Response(status=500, text=self._says, content_type="text/html")

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, HOST, self.port).start()
        await asyncio.Event().wait()


class WatchedFleet:
    """``engines`` stand-ins, one that is hostile, the daemon, and a trainer that publishes when it is told to."""

    def __init__(self, directory: Path, engines: int = 3, says: str = MARKUP) -> None:
        paths = [str(SOAK), str(SOAK.parent), str(SOAK.parent / "e2e"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "UCX_TLS": "tcp,self,sm",
            "OMP_NUM_THREADS": "1", "WEIGHTSYNC_LANDING_MIB": "1", VARIABLE: str(directory),
        }  # fmt: skip
        script = HERE / "stopping_engine.py"
        self.standins = {f"e{n}": StandIn(f"e{n}", directory, environment, script=script) for n in range(engines)}
        servers = {**self.standins, "stranger": Hostile(says)}
        settings = {**SETTINGS, "commit": {"patience_seconds": PATIENCE, "min_engines": engines}}
        # An engine that is stopped is not lost for it, and its round waits for it.
        waits = {"lost_after_heartbeats": 100, "quiesce_seconds": 100}
        settings["deadlines"] = {**SETTINGS["deadlines"], **waits, "attach_seconds": 2}
        self.fleet = Fleet(directory, servers, settings=settings, run_id="glm-4-rl")  # type: ignore[arg-type]
        for engine in self.standins.values():
            engine.belong_to(self.fleet)
        self._environment, self._directory = environment, directory
        self.trainer: Trainer | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.fleet.port}"

    def token(self, role: str) -> str:
        return (self.fleet.credentials / f"{role}.token").read_text().strip()

    def start(self) -> None:
        for engine in self.standins.values():
            engine.start()
        self.fleet.start_daemon()
        self.trainer = self.fleet.start_trainer(
            self._directory,
            1,
            str(SOAK / "soak_trainer.py"),
            env=counting(self._environment, self._directory, "trainer"),
        )
        assert self.trainer.hear() == {"ready": True}

    def publish(self, step: int) -> None:
        self.begin(step)
        self.committed()

    def begin(self, step: int) -> None:
        """Publish, and do not wait."""
        assert self.trainer is not None
        self.trainer.tell(step=step)

    def committed(self) -> None:
        """Wait until what has begun is."""
        assert self.trainer is not None
        answer = self.trainer.hear()
        assert "error" not in answer, answer

    @contextlib.contextmanager
    def stopped_in_round(self, engine: str, step: int) -> Iterator[None]:
        """Publish; inside, the engine is stopped in the middle of the round."""
        (self._directory / f"{engine}.stop").touch()
        process = self.standins[engine].process
        assert process is not None
        assert process.child is not None
        stat = Path(f"/proc/{process.child.pid}/stat")
        self.begin(step)
        try:
            self.fleet.until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", f"{engine} to be stopped")
            yield
        finally:
            process.kill(signal.SIGCONT)

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Inside, a round waits so long for whoever is behind."""
        self._take(patience_seconds=seconds)
        try:
            yield
        finally:
            self._take(patience_seconds=PATIENCE)

    def _take(self, **commit: float) -> None:
        """Have the daemon take these keys of ``commit`` while it runs."""
        assert self.fleet.daemon is not None
        said = "the configuration was read again"
        before = self.fleet.daemon.log.read_text().count(said)
        self.fleet.settings["commit"] |= commit
        self.fleet.write_config()
        self.fleet.daemon.kill(signal.SIGHUP)
        log = self.fleet.daemon.log
        self.fleet.until(lambda: log.read_text().count(said) > before, "the daemon to take its configuration")

    def close(self) -> None:
        """Engines and trainer have nothing to put away."""
        for process in [*(self.trainer.ranks if self.trainer else []), *(e.process for e in self.standins.values())]:
            if process is not None:
                process.kill()
                process.stop()
        self.fleet.close()


@contextlib.contextmanager
def watched_fleet(directory: Path, engines: int = 3, says: str = MARKUP) -> Iterator[WatchedFleet]:
    made = WatchedFleet(directory, engines, says)
    try:
        made.start()
        yield made
    finally:
        made.close()
