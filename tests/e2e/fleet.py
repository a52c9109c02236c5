"""A whole fleet for the e2e tests: the daemon, trainer ranks and vLLM servers, each a real process."""

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import preloaded
import yaml
from ports import HOST, free_port
from serving import VllmServer
from weightsync.agents.link.tls import CA_VARIABLE
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.settings.credentials import make_tokens
from weightsync.orchestrator.settings.tls import client_context

HERE = Path(__file__).resolve().parent
DAEMON_READY_SECONDS = 120.0
ANSWER_SECONDS = 120.0
STOP_SECONDS = 15.0
CUDA_TRAINER = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Memory of such segments cannot leave its process, so that arenas must not come from them."""


class Timeout(AssertionError):
    """Something did not happen in time; the message carries the daemon's log."""


@dataclass
class Process:
    """A child in a session of its own, with its output in a file."""

    command: Sequence[str]
    log: Path
    env: Mapping[str, str]
    pipe: bool = False
    image: str = ""
    """Of ``preloaded``; without one its interpreter begins anew."""
    child: preloaded.Child | None = None

    def start(self) -> Self:
        with self.log.open("ab") as log:
            stdout = subprocess.PIPE if self.pipe else log.fileno()
            self.child = preloaded.start(self.image, self.command, self.env, stdout, log.fileno(), self.pipe)
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.child is not None and self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, number)

    def stop(self) -> int:
        """SIGTERM, then SIGKILL; its exit code."""
        assert self.child is not None
        self.kill(signal.SIGTERM)
        try:
            code = self.child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return code

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


class Told(dict[str, Any]):
    """An answer of a trainer; whoever asks it for what it does not say is shown what it does."""

    def __missing__(self, key: str) -> NoReturn:
        raise AssertionError(f"the trainer says no {key}: {dict(self)}")


@dataclass
class Trainer:
    """``scripted_trainer.py`` on ``world`` ranks."""

    ranks: list[Process]

    def tell(self, **order: Any) -> None:
        child = self.ranks[0].child
        assert child is not None
        assert child.stdin is not None
        child.stdin.write(json.dumps(order).encode() + b"\n")
        child.stdin.flush()

    def hear(self, seconds: float = ANSWER_SECONDS) -> Told:
        """The next answer of rank 0."""
        import select

        child = self.ranks[0].child
        assert child is not None
        assert child.stdout is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([child.stdout], [], [], 0.2)[0]:
                line = child.stdout.readline()
                if not line:
                    raise AssertionError(f"the trainer ended\n{self.ranks[0].tail()}")
                if line.startswith(b"{"):
                    return Told(json.loads(line))
            elif any(rank.child is not None and rank.child.poll() not in (None, 0) for rank in self.ranks):
                raise AssertionError("a trainer rank failed\n" + "\n".join(rank.tail(20) for rank in self.ranks))
        raise Timeout(f"no answer of the trainer within {seconds} s\n" + "\n".join(r.tail(20) for r in self.ranks))

    def save(self, step: int) -> None:
        """Write the checkpoint of a version that may be published later."""
        self.tell(do="save", step=step)
        assert self.hear() == {"saved": step}

    def publish(self, step: int, **more: Any) -> Told:
        self.tell(do="publish", step=step, **more)
        return self.hear()

    def stop(self) -> None:
        for rank in self.ranks:
            rank.stop()


@dataclass
class Fleet:
    """One run: its directory, its configuration, and the processes that were started.

    Its daemon is where the first of its real servers looks for it, and the token is that server's. ``with_tls``: of a
    fleet without real servers.
    """

    directory: Path
    engines: Mapping[str, VllmServer]
    settings: dict[str, Any] = field(default_factory=dict)
    run_id: str = "e2e"
    host: str = HOST
    port: int = 0
    with_tls: bool = False
    daemon: Process | None = None
    trainers: list[Trainer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "run").mkdir(exist_ok=True)
        self.credentials = self.directory / "credentials"
        make_tokens(self.credentials)
        servers = [server for server in self.engines.values() if isinstance(server, VllmServer)]
        if servers:
            (self.credentials / "engine.token").write_text(servers[0].token + "\n")
        self.port = self.port or (servers[0].hub_port if servers else free_port())
        self.token = self.credentials / "trainer.token"
        self.certificates = self.directory / "certificates"
        if self.with_tls:
            make_certificates(self.certificates, [self.host], (), 2)
        self.config = self.directory / "config.yaml"
        self.write_config()

    def write_config(self) -> None:
        """With the settings as they are now; a daemon that runs takes them on SIGHUP."""
        self.config.write_text(yaml.safe_dump(self._document()))

    def _document(self) -> dict[str, Any]:
        quick = {"probe_interval_seconds": 2, "heartbeat_seconds": 2, "transfer_seconds": 60, "quiesce_seconds": 30}
        document: dict[str, Any] = {
            "run": {"id": self.run_id, "directory": str(self.directory / "run")},
            "state_directory": str(self.directory / "state"),
            "listen": {"host": self.host, "port": self.port} | ({} if self.host == HOST else {"insecure": True}),
            "credentials": str(self.credentials),
            "engines": [{"name": name, "url": server.url} for name, server in self.engines.items()],
            "deadlines": quick,
            "rescan_seconds": 1,
        }
        for key, value in self.settings.items():
            document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
        if self.with_tls:
            names = {"certificate_file": "daemon.pem", "key_file": "daemon.key", "ca_file": "ca.pem"}
            document["listen"]["tls"] = {key: str(self.certificates / name) for key, name in names.items()}
            document["advertise_url"] = self.url
        return document

    @property
    def url(self) -> str:
        """The daemon's."""
        return f"http{'s' * self.with_tls}://{self.host}:{self.port}"

    @property
    def hub_url(self) -> str:
        """Where agents come to."""
        return f"ws{self.url.removeprefix('http')}/agents"

    @property
    def environment(self) -> dict[str, str]:
        """What an agent needs beside its place: the authority."""
        return {CA_VARIABLE: str(self.certificates / "ca.pem")} if self.with_tls else {}

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    # ---------------------------------------------------------------------------------------------------------- daemon
    def start_daemon(self, script: Path | None = None, env: Mapping[str, str] | None = None) -> Process:
        """The daemon itself, or ``script`` that runs it in a way of its own."""
        runs = ["-m", "weightsync.orchestrator.cli.main"] if script is None else [str(script)]
        command = [sys.executable, *runs, "run", "--config", str(self.config)]
        self.daemon = Process(command, self.directory / "daemon.log", {**os.environ, **(env or {})}).start()
        self.until(self._serves, "the daemon to listen", DAEMON_READY_SECONDS)
        return self.daemon

    def daemon_log(self) -> str:
        """All that its daemons have said so far."""
        return (self.directory / "daemon.log").read_text(errors="replace")

    def restart_daemon(self, **settings: Any) -> Process:
        """An orderly end, and a daemon whose configuration has these sections in place of the old ones."""
        if self.daemon is not None:
            self.daemon.stop()
        self.settings = {**self.settings, **settings}
        self.write_config()
        return self.start_daemon()

    def _serves(self) -> bool:
        assert self.daemon is not None
        assert self.daemon.child is not None
        if self.daemon.child.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.daemon.child.returncode}\n{self.daemon.tail()}")
        return self.ask("/healthz") is not None

    def ask(self, path: str) -> Any:
        """GET of the daemon's admin routes; None when it does not answer."""
        request = urllib.request.Request(f"{self.url}{path}", headers=self._operator())
        try:
            with urllib.request.urlopen(request, timeout=5, context=self._context()) as response:
                body = response.read()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None
        return json.loads(body) if body.startswith(b"{") else body.decode()

    def order(self, verb: str, target: str = "") -> None:
        """An operator's verb; raises if it is refused."""
        headers = {**self._operator(), "Content-Type": "application/json"}
        body = json.dumps({"target": target, "reason": "a test", "by": "tests"}).encode()
        request = urllib.request.Request(f"{self.url}/verbs/{verb}", body, headers, method="POST")
        with urllib.request.urlopen(request, timeout=5, context=self._context()):
            pass

    def command(self, *words: str) -> str:
        """What the command line prints, asked in a process of its own; it must say that all is well."""
        command = [sys.executable, "-m", "weightsync.orchestrator.cli.main", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _context(self) -> ssl.SSLContext | None:
        return client_context(self.certificates / "ca.pem", None, None) if self.with_tls else None

    def _operator(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {(self.credentials / 'operator.token').read_text().strip()}"}

    def status(self) -> Any:
        return self.ask("/status")

    def engine(self, name: str) -> dict[str, Any]:
        status = self.status()
        return {} if status is None else next(dict(e) for e in status["engines"] if e["name"] == name)

    def until(self, holds: Callable[[], Any], what: str, seconds: float = ANSWER_SECONDS) -> Any:
        """Wait until ``holds`` is true, by looking."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            result = holds()
            if result:
                return result
            time.sleep(0.05)
        tail = self.daemon.tail(60) if self.daemon is not None else ""
        raise Timeout(f"waited {seconds} s for {what}\nstatus: {self.status()}\n{tail}")

    # --------------------------------------------------------------------------------------------------------- trainer
    def start_trainer(
        self,
        model_dir: Path,
        world: int = 1,
        script: str = "scripted_trainer.py",
        device: str = "cpu",
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> Trainer:
        """Its ranks; ``hear`` tells when they are connected. On "cuda" with expandable segments, as trainers do.

        ``before``: words before the command of each, such as ``ip netns exec``.
        """
        of_device = {"UCX_TLS": "tcp,self,sm"} if device == "cpu" else CUDA_TRAINER
        rendezvous = free_port()
        processes = []
        for rank in range(world):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": HOST,
                "MASTER_PORT": str(rendezvous), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]), **of_device,
                **self.environment, **(env or {}),
            }  # fmt: skip
            command = [
                *before, sys.executable, str(HERE / script), "--hub-url", self.hub_url,
                "--token-file", str(self.token), "--run-id", self.run_id, "--run-dir", str(self.directory / "run"),
                "--model-config", str(model_dir / "config.json"), "--checkpoints", str(self.checkpoints),
                "--device", device,
            ]  # fmt: skip
            log = self.directory / f"trainer-{len(self.trainers)}-{rank}.log"
            image = "torch" if device == "cpu" and not before else ""
            processes.append(Process(command, log, environment, pipe=True, image=image).start())
        trainer = Trainer(processes)
        self.trainers.append(trainer)
        return trainer

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.stop()
        if self.daemon is not None:
            self.daemon.stop()


@contextlib.contextmanager
def fleet(directory: Path, engines: Mapping[str, VllmServer], **more: Any) -> Iterator[Fleet]:
    """A Fleet with its daemon running; everything but the engines is ended at the end."""
    whole = Fleet(directory, engines, **more)
    try:
        whole.start_daemon()
        yield whole
    finally:
        whole.close()
