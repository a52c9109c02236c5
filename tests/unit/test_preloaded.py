"""A forked process is told from an ordinary one by its start alone: arguments, environment, files, session and end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest

TELLS = """
import json, os, sys, helper
print(json.dumps({
    "argv": sys.argv, "name": __name__, "session": os.getsid(0) == os.getpid(), "environ": dict(os.environ),
    "helper": helper.__file__, "said": sys.stdin.readline(), "cwd": os.getcwd(),
    "files": len(os.listdir("/proc/self/fd")),
}), flush=True)
sys.exit(int(sys.stdin.readline()))
"""  # fmt: skip
SPAWNS = """
import multiprocessing, os, sys

def child(queue):
    queue.put((os.environ["LATE"], os.getsid(0), os.getpid()))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    os.environ["LATE"] = "set after the start"
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    late, session, pid = queue.get(timeout=30)
    process.join(30)
    assert (late, session, process.exitcode) == ("set after the start", os.getpid(), 0)
    assert pid == process.pid != os.getpid()
"""
SECONDS = 30


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").touch()
    (tmp_path / "script.py").write_text(TELLS)
    return tmp_path / "script.py"


@pytest.mark.parametrize("image", ["bare", ""])
@pytest.mark.parametrize("way", ["script", "module"])
def test_it_begins_as_an_ordinary_process_does(image: str, way: str, script: Path, tmp_path: Path) -> None:
    command = [sys.executable, *([str(script)] if way == "script" else ["-m", "script"]), "first", "second"]
    env = {"LC_ALL": "C.UTF-8", "ONLY": "this", "PYTHONPATH": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        child = preloaded.start(image, command, env, subprocess.PIPE, log.fileno(), pipe=True)
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        child.stdin.write(b"a line\n")
        child.stdin.flush()
        told = json.loads(child.stdout.readline())
        assert child.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0)
        child.stdin.write(b"7\n")
        child.stdin.flush()
        assert child.wait(SECONDS) == child.wait(SECONDS) == child.poll() == 7
    # Standard files, the listing, and what keeps the process alive that forks what it spawns.
    assert told == {
        "argv": [str(script), "first", "second"], "name": "__main__", "session": True,
        "environ": env,
        "helper": str(tmp_path / "helper.py"), "said": "a line\n", "cwd": os.getcwd(), "files": 5 if image else 4,
    }, (tmp_path / "log").read_text()  # fmt: skip


@pytest.mark.parametrize("image", ["bare", ""])
def test_a_killed_one_is_told_by_its_signal(image: str, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import signal; print(flush=True); signal.pause()")
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, str(tmp_path / "waits.py")]
        child = preloaded.start(image, command, os.environ, subprocess.PIPE, log.fileno())
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"\n"
        os.killpg(child.pid, signal.SIGKILL)
        assert child.wait(SECONDS) == -signal.SIGKILL
        child.kill()


@pytest.mark.parametrize("image", ["bare", ""])
def test_what_fails_is_an_error_with_its_traceback(
    image: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fails.py").write_text("print('before', flush=True); raise LookupError('nothing there')")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        preloaded.run(image, [sys.executable, str(tmp_path / "fails.py")], os.environ, SECONDS)
    assert (failed.value.returncode, failed.value.output) == (1, b"before\n")
    assert "LookupError: nothing there" in capfd.readouterr().err
    (tmp_path / "hangs.py").write_text("import signal; signal.pause()")
    with pytest.raises(subprocess.TimeoutExpired):
        preloaded.run(image, [sys.executable, str(tmp_path / "hangs.py")], os.environ, 0.3)


@pytest.mark.parametrize("image", ["bare", ""])
def test_what_it_spawns_knows_what_it_is_sent_and_belongs_to_its_session(image: str, tmp_path: Path) -> None:
    (tmp_path / "spawns.py").write_text(SPAWNS)
    assert preloaded.run(image, [sys.executable, str(tmp_path / "spawns.py")], os.environ, SECONDS) == b""


def test_what_a_library_would_have_read_at_its_load_makes_it_an_ordinary_process() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert preloaded.early(env) == preloaded.early({**env, "WEIGHTSYNC_MODE": "flip", "PYTHONPATH": "elsewhere"})
    for name in ("OMP_NUM_THREADS", "LD_PRELOAD", "TORCH_COMPILE_DISABLE", "PYTHONHASHSEED"):
        assert preloaded.early(env) != preloaded.early({**env, name: "2"})
