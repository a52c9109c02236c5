"""What a process of the soak counts inside itself: whenever it gets SIGUSR1, one JSON object in a file.

``objects``: that Python's collector tracks; ``registrations``, ``peers``, ``edges``: of its NIXL endpoints; ``tasks``:
of its event loops. The first comes unasked: from then on the signal is understood. Whoever asks removes the file, so
that the next one is the answer. At SIGUSR2 it says on stderr where all its threads are.
"""

import asyncio
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

VARIABLE = "WEIGHTSYNC_SOAK_COUNTS"

# At the import, which is the first of a process, for the threads of later imports must not get the signal either.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def install() -> None:
    """Count from now on; the file is the one that the environment names.

    A thread waits for the signal. A handler would run in the main thread only once that is back from what it waits for:
    a signal that comes just before a read begins is not seen before the read ends.
    """
    path = Path(os.environ[VARIABLE])
    faulthandler.register(signal.SIGUSR2)

    def answer() -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(counted()))
        part.replace(path)

    def wait() -> None:
        while True:
            signal.sigwait({signal.SIGUSR1})
            answer()

    threading.Thread(target=wait, name="counts", daemon=True).start()
    answer()


def counted() -> dict[str, int]:
    gc.collect()
    objects = gc.get_objects()
    # By its type: ``isinstance`` asks a proxy for its class, and raises where what that stood for is gone.
    tasks = sum(issubclass(type(o), asyncio.Task) for o in objects)
    return {"objects": len(objects), "tasks": tasks, **_nixl(objects)}


def _nixl(objects: list[Any]) -> dict[str, int]:
    module = sys.modules.get("weightsync.agents.transport.nixl.endpoint")
    if module is None:
        return {}
    # Another thread may be making one, which is collected as soon as it is begun, and has its attributes one by one.
    ends = [o for o in objects if type(o) is module.NixlEndpoint and hasattr(o, "_scratch_memory")]
    return {
        "endpoints": len(ends),
        "registrations": sum(len(end._registrations) for end in ends),
        "peers": sum(len(end._peers) for end in ends),
        "edges": sum(len(end._edges) + len(end._orphans) + len(end._warm) for end in ends),
    }
