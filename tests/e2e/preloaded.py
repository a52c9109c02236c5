"""Processes that begin with their imports done: forked from one that has imported torch or vLLM, and has done no more.

Nine tenths of the processor time of a server's start are imports, in its API server, its engine core and its workers
alike. In a test run that called ``use`` a child is forked from a *nursery* instead: this file as a program of its own,
one per image. Nothing of a model, of an engine or of our code is made or imported there, and no thread runs, so that a
child stands where a fresh interpreter stands after the same imports: session, environment, ``sys.path``, arguments and
standard files are its own. What its ``multiprocessing`` would spawn is forked likewise, from a copy of the child that
was put aside before its program began: as of a spawned process, all that it knows is what it is sent.

Without ``use``, as in benchmarks and in the demo, ``start`` begins an ordinary process.
"""

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

IMAGES = {
    "vllm": (
        "vllm.entrypoints.cli.serve", "vllm.entrypoints.cli.launch", "vllm.entrypoints.cli.openai",
        "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3",
    ),
    "torch": (
        "torch", "torch.distributed", "torch.distributed.device_mesh", "torch.distributed.tensor", "safetensors.torch",
        "aiohttp.web", "msgspec", "yaml",
    ),
    "bare": (),
}  # fmt: skip
"""What the processes of each image have imported before their program begins."""

READ_EARLY = ("OMP_", "GOMP_", "KMP_", "MKL_", "LD_", "TORCH_", "PYTHON", "VLLM_CPU_", "VLLM_LOGGING_", "VLLM_USE_")
"""Beginnings of variables that Python and libraries read as they begin; a child that has other ones is not forked."""

STATUS = struct.Struct("q")
ORDER_BYTES = 256 * 1024
START_SECONDS = 120.0
"""With the imports of the first child's image: 8 s on two idle cores."""
STOP_SECONDS = 10.0
STANDARD_ERROR = 2
_nurseries: "dict[str, Nursery]" = {}
_used = False


class Forked:
    """A child of a nursery, with as much of ``subprocess.Popen`` as tests use."""

    def __init__(self, args: Sequence[str], told: socket.socket) -> None:
        self.args, self._told = args, told
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.returncode: int | None = None
        self.pid = self._number(START_SECONDS)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired: it has not ended in time."""
        if self.returncode is None:
            self.returncode = self._number(timeout)
            self._told.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _number(self, timeout: float | None) -> int:
        self._told.settimeout(timeout)
        try:
            said = self._told.recv(STATUS.size)
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0) from None
        if not said:
            raise RuntimeError(f"the nursery ended before its child: {self.args}")
        return int(STATUS.unpack(said)[0])


Child = Forked | subprocess.Popen[bytes]


def use() -> None:
    """From now on this process's children are forked; a nursery begins when the first one asks for it."""
    global _used
    _used = True


def in_use() -> bool:
    """Whether this is a test run that called ``use``."""
    return _used


def start(
    image: str, command: Sequence[str], env: Mapping[str, str], stdout: int, stderr: int, pipe: bool = False
) -> Child:
    """Begin a Python program in a session of its own.

    Args:
        image: one of IMAGES, or "" for an ordinary process.
        command: the interpreter, then ``-m MODULE`` or a script, then arguments.
        stdout: number of a file, or subprocess.PIPE.
        pipe: its standard input is one, else it has none.
    """
    nursery = _nursery(image, env) if _used and image else None
    if nursery is not None:
        return nursery.fork(command, env, stdout, stderr, pipe)
    stdin = subprocess.PIPE if pipe else subprocess.DEVNULL
    return subprocess.Popen(command, env=env, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)


def run(image: str, command: Sequence[str], env: Mapping[str, str], seconds: float) -> bytes:
    """What a program writes to its standard output, as by ``start``.

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it was not done in time, and has been killed.
    """
    with tempfile.TemporaryFile() as out:
        child = start(image, command, env, out.fileno(), STANDARD_ERROR)
        try:
            code = child.wait(seconds)
        finally:
            child.kill()
            child.wait(STOP_SECONDS)
        out.seek(0)
        if code:
            raise subprocess.CalledProcessError(code, list(command), out.read())
        return out.read()


def _nursery(image: str, env: Mapping[str, str]) -> "Nursery | None":
    """The one of ``image``, if its children can be forked with ``env``."""
    if image not in _nurseries:
        _nurseries[image] = Nursery(image, env)
    return _nurseries[image] if early(env) == _nurseries[image].early else None


def early(env: Mapping[str, str]) -> dict[str, str]:
    """What libraries read of ``env`` when they are loaded, and the network namespace, which is inherited."""
    read = {name: value for name, value in env.items() if name.startswith(READ_EARLY) and name != "PYTHONPATH"}
    return {**read, "namespace": os.readlink("/proc/thread-self/ns/net")}


class Nursery:
    """This file as a program, from the side of whoever wants children. It ends when this process does."""

    def __init__(self, image: str, env: Mapping[str, str]) -> None:
        self.early = early(env)
        # As vLLM's CPU platform has it for its workers, for which it is too late here.
        gomp = Path(str(importlib.util.find_spec("torch").origin)).parent / "lib" / "libgomp.so.1"  # type: ignore[union-attr]
        preload = {"LD_PRELOAD": str(gomp)} if image == "vllm" and gomp.exists() else {}
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ORDER_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, image, str(theirs.fileno())],
                env={**env, **preload}, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        atexit.register(self.close)

    def close(self) -> None:
        self._control.close()
        self._process.wait(STOP_SECONDS)

    def fork(self, command: Sequence[str], env: Mapping[str, str], stdout: int, stderr: int, pipe: bool) -> Forked:
        """The arguments of ``start``."""
        told, tells = socket.socketpair()
        theirs, write, read = [], None, None
        if pipe:
            end, write = os.pipe()
            theirs.append(end)
        else:
            theirs.append(os.open(os.devnull, os.O_RDONLY))
        if stdout == subprocess.PIPE:
            read, end = os.pipe()
            theirs.append(end)
        else:
            theirs.append(os.dup(stdout))
        order = json.dumps({"command": list(command[1:]), "env": dict(env), "cwd": os.getcwd()}).encode()
        try:
            socket.send_fds(self._control, [order], [*theirs, stderr, tells.fileno()])
        finally:
            tells.close()
            for fd in theirs:
                os.close(fd)
        child = Forked(command, told)
        child.stdin = None if write is None else os.fdopen(write, "wb", buffering=0)
        child.stdout = None if read is None else os.fdopen(read, "rb")
        return child


# ------------------------------------------------------------------------------------------------- its process
def main() -> None:
    """A nursery until its control socket is closed; in each child that it forks, the program of the child."""
    image, control = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    given = {sys.path[0], *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    installed = [entry for entry in sys.path if entry not in given]
    for name in IMAGES[image]:
        importlib.import_module(name)
    made = [name for name in sys.modules if name.partition(".")[0] in ("weightsync", "nixl", "nixl_cu12")]
    threads = os.listdir("/proc/self/task")
    if made or len(threads) != 1:
        raise SystemExit(f"the image {image} may hold imports of others only, not {made} and {len(threads)} threads")
    gc.collect()
    gc.freeze()  # so that a collection in a child does not write to the pages that it shares
    order = fork_for(control)
    if order is not None:
        become(order, installed)
        if image != "torch":  # whose processes spawn nothing
            fork_what_is_spawned()
        perform(order["command"])


def fork_for(control: socket.socket) -> dict[str, Any] | None:
    """Fork a child for each order, and tell its end: in a child its order, and None when ``control`` is closed."""
    living: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as waiting, control:
        waiting.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is not control:
                    pid, tells = living.pop(key.fd)
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with contextlib.suppress(OSError), tells:
                        tells.send(STATUS.pack(code))
                    continue
                order, files, *_ = socket.recv_fds(control, ORDER_BYTES, 4)
                if not order:
                    return None
                *standard, last = files
                tells = socket.socket(fileno=last)
                pid = os.fork()
                if pid == 0:
                    os.setsid()  # before anybody knows it: whoever signals its group finds one
                    tells.send(STATUS.pack(os.getpid()))
                    for pidfd, (_, other) in living.items():
                        os.close(pidfd)
                        other.close()
                    tells.close()
                    for number, fd in enumerate(standard):
                        os.dup2(fd, number)
                        os.close(fd)
                    return dict(json.loads(order))
                for fd in standard:
                    os.close(fd)
                pidfd = os.pidfd_open(pid)
                waiting.register(pidfd, selectors.EVENT_READ)
                living[pidfd] = pid, tells


def become(order: dict[str, Any], installed: list[str]) -> None:
    """Environment, folder and ``sys.path`` of a process that had begun with this order."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    first = order["cwd"] if order["command"][0] == "-m" else str(Path(order["command"][0]).parent)
    given = [entry for entry in order["env"].get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *given, *installed]
    importlib.invalidate_caches()


def fork_what_is_spawned() -> None:
    """``multiprocessing``'s own fork server, forked from here instead of begun anew, serves the method "spawn"."""
    from multiprocessing import context, forkserver, popen_forkserver, resource_tracker, spawn

    describe, prepare = spawn.get_preparation_data, spawn.prepare

    def described(name: str) -> dict[str, Any]:
        return {**describe(name), "environ": dict(os.environ)}  # it may have changed since the fork server began

    def prepared(data: dict[str, Any]) -> None:
        os.environ.clear()
        os.environ.update(data.pop("environ"))
        prepare(data)

    spawn.get_preparation_data, spawn.prepare = described, prepared
    context.SpawnProcess._Popen = staticmethod(popen_forkserver.Popen)  # type: ignore[assignment]
    server = forkserver._forkserver
    server.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]
    ends, alive = os.pipe()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # a name of the kernel's
    listener.listen()
    if os.fork() == 0:
        try:
            os.close(alive)
            forkserver.main(listener.detach(), ends, [])
        finally:
            os._exit(0)
    server._forkserver_address, server._forkserver_alive_fd = listener.getsockname(), alive
    listener.close()
    os.close(ends)


def perform(command: Sequence[str]) -> None:
    if command[0] == "-m":
        sys.argv = [command[1], *command[2:]]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
