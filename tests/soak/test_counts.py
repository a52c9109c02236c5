"""What a process of the soak counts of itself, while its other threads make and forget things."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

BESIDE_OTHERS = """
import json, weakref
import counts
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.messages import NixlSettings

class Short: pass

short = Short()
proxies = [weakref.proxy(short)]
del short
begun = NixlEndpoint.__new__(NixlEndpoint)
before = counts.counted()
made = NixlEndpoint("counted", NixlSettings())
print(json.dumps([before, counts.counted()]))
"""


def test_an_endpoint_in_the_making_and_a_proxy_of_what_is_gone_end_no_count() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run(
        [sys.executable, "-c", BESIDE_OTHERS], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout.splitlines()[-1])
    assert (before["endpoints"], after["endpoints"]) == (0, 1)
    assert after["registrations"] == 1
    assert before["objects"] > 0 == before["tasks"]
