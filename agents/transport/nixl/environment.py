"""Environment variables for the making of one NIXL agent, and for nothing else.

UCX reads its configuration from the environment when a backend is created. Another agent in the same process (vLLM's
KV connector has one) must neither see our settings nor hand us its own.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_making = threading.RLock()


@contextmanager
def environment(overrides: Mapping[str, str | None]) -> Iterator[None]:
    """Set (or with None: unset) variables, and put back exactly what was there before.

    One caller at a time: two agents being made at once would read each other's settings.
    """
    with _making:
        before = {name: os.environ.get(name) for name in overrides}
        _apply(overrides)
        try:
            yield
        finally:
            _apply(before)


def _apply(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
