"""Real NIXL between hosts whose link is gone: nobody answers, and nobody is kept from anything by it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SILENT = """
mount -t sysfs sysfs /sys &&
ip link set lo up && ip link add link0 type veth peer name nobody && ip address add 192.0.2.{here}/24 dev link0 &&
ip link set link0 up && ip link set nobody up &&
ip neighbour replace 192.0.2.{there} lladdr 02:57:53:00:00:ff dev link0 nud permanent &&
UCX_TLS=tcp,self UCX_NET_DEVICES=link0 exec "$@"
"""
"""A host from which nothing that is sent to the other one arrives. 192.0.2.0/24 is for documents (RFC 5737)."""

DEADLINE_SECONDS = 40.0


def on_host(here: int, there: int, *command: str) -> list[str]:
    """``command``, in a namespace of its own that both ends of its link are in."""
    return ["unshare", "--net", "--mount", "sh", "-c", SILENT.format(here=here, there=there), "sh", *command]


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(script)), *arguments]


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or shutil.which("ip") is None
    or subprocess.run(on_host(1, 2, "true"), capture_output=True, check=False).returncode != 0,
    reason="no tools or no rights to make a network namespace with a link of its own",
)
def test_a_peer_whose_address_does_not_answer_keeps_nobody_waiting() -> None:
    """TCP would try for two minutes, and by itself UCX waits for it within the call that connects."""
    pipe = subprocess.PIPE
    with subprocess.Popen(on_host(1, 2, *python("nixl_peer.py", "4096")), stdin=pipe, stdout=pipe, text=True) as peer:
        try:
            assert peer.stdout is not None
            facts = json.loads(peer.stdout.readline())
            writer = on_host(2, 1, *python("apart_writer.py", facts["name"], facts["card"]))
            said = subprocess.run(writer, stdout=pipe, text=True, timeout=DEADLINE_SECONDS, check=True).stdout
        finally:
            peer.kill()
    told = json.loads(said)
    assert told["far"] is False
    assert told["longest"] < 5.0
