"""The daemon as deploy/kubernetes runs it: its arguments, its volumes, its probes, and what Prometheus asks."""

import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import kubelet
import pytest
from kubelet import MANIFESTS, Volumes, one
from ports import HOST, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

START_SECONDS = 60.0


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """The root of the daemon's pod, and its port."""
    copy = tmp_path / "copy"
    shutil.copytree(MANIFESTS, copy)
    kubelet.made(copy)
    root = tmp_path / "pod"
    root.mkdir()
    Volumes(one("StatefulSet", "weightsync"), copy, root)
    port = free_port()
    text = (copy / "config.yaml").read_text()
    for path in ("/shared", "/var/lib", "/etc/weightsync"):
        text = text.replace(f": {path}", f": {root}{path}")
    (root / "config.yaml").write_text(text.replace("7410", str(port)))
    (container,) = one("StatefulSet", "weightsync")["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["run", "--config"]
    command = [
        sys.executable,
        "-m",
        "weightsync.orchestrator.cli.main",
        *container["args"][:2],
        str(root / "config.yaml"),
    ]
    with (root / "log").open("wb") as log:
        daemon = subprocess.Popen(command, stderr=log, env=os.environ)
    yield root, port
    daemon.terminate()
    assert daemon.wait(30) == 0, (root / "log").read_text()


def asked(root: Path, port: int, path: str, token: str = "") -> tuple[int, str]:
    """Status and body; 0 while nobody answers."""
    context = ssl.create_default_context(cafile=str(root / "etc/weightsync/certificates/ca.pem"))
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"https://{HOST}:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def test_its_probes_answer_and_prometheus_may_look(pod: tuple[Path, int]) -> None:
    root, port = pod
    (container,) = one("StatefulSet", "weightsync")["spec"]["template"]["spec"]["containers"]
    deadline = time.monotonic() + START_SECONDS
    while asked(root, port, container["startupProbe"]["httpGet"]["path"])[0] != 200:
        assert time.monotonic() < deadline, (root / "log").read_text()
        time.sleep(0.05)
    for probe in ("livenessProbe", "readinessProbe"):
        assert asked(root, port, container[probe]["httpGet"]["path"])[0] == 200
    (endpoint,) = one("ServiceMonitor", "weightsync")["spec"]["endpoints"]
    assert asked(root, port, endpoint["path"])[0] == 401
    token = (root / "etc/weightsync/credentials" / endpoint["authorization"]["credentials"]["key"]).read_text().strip()
    code, told = asked(root, port, endpoint["path"], token)
    assert code == 200
    assert "weightsync_build_info" in told
    status = json.loads(asked(root, port, "/status", token)[1])
    assert status["run"] == "glm5-rl"
    journal = root / "var/lib/weightsync/journals/glm5-rl/journal.sqlite"
    assert journal.exists()
    assert journal.stat().st_mode & 0o077 == 0
