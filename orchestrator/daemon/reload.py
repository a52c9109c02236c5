"""The configuration, read again on SIGHUP: what may change while the daemon runs does, or all stays as it was."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import structlog
from pydantic import BaseModel
from weightsync.orchestrator.core.events import PolicyChanged
from weightsync.orchestrator.daemon import log as daemon_log
from weightsync.orchestrator.daemon.access.descriptors import limit, too_few
from weightsync.orchestrator.daemon.engines.calls import Engines
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.policy import policy_of
from weightsync.orchestrator.daemon.run_directory.watcher import wakes
from weightsync.orchestrator.settings.engine_lists import look
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import Settings

log = structlog.get_logger(__name__)

MAY_CHANGE: Final = ("commit.", "deadlines.", "engines", "log.", "pause.", "retry.", "trainer.world")
"""Beginnings of keys; what is in the files of keys and of ``engines_from`` may change, too."""

MAY_NOT: Final = ("deadlines.heartbeat_seconds", "deadlines.lost_after_heartbeats", "engines_from")
"""Of those all the same: every agent was told them when it connected, and what is watched is watched from the start."""


class Reload:
    """Holds the settings that count. ``read`` gives the new ones; what it raises leaves the old ones in place.

    ``credentials`` reads the token files anew.
    """

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings] | None,
        inbox: Inbox,
        engines: Engines,
        credentials: Callable[[], Awaitable[None]],
    ) -> None:
        self.settings = settings
        self._read, self._inbox, self._engines, self._credentials = read, inbox, engines, credentials
        self._asked = asyncio.Event()

    def stop_seconds(self) -> float:
        """How long a round may take once the daemon is told to stop."""
        return self.settings.deadlines.stop_seconds

    def ask(self) -> None:
        """SIGHUP arrived, or a file of ``engines_from`` has changed."""
        self._asked.set()

    async def watch(self) -> None:
        """Ask whenever ``engines_from`` changes; until cancelled."""
        source = self.settings.engines_from
        if source is None:
            return
        seen = None  # it may have changed since the settings were read, so the first look asks, too
        async with contextlib.aclosing(wakes(source, self.settings.rescan_seconds)) as woken:
            async for _ in woken:
                found = await asyncio.to_thread(look, source)
                if found != seen:
                    seen = found
                    self.ask()

    async def run(self) -> None:
        """Read again whenever asked, once for all that came meanwhile; until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                await self.again()
            except Exception as error:  # whatever is wrong with a file, the daemon goes on
                reason = "; ".join(str(error).splitlines()) or repr(error)
                log.error("the configuration is not taken, the old one stays", reason=reason)

    async def again(self) -> None:
        """Read the credentials and the configuration, and take all of each, or nothing.

        Raises:
            ConfigError: the file, or one that it names, cannot be used.
            ValueError: something in it cannot change while the daemon runs.
        """
        await self._credentials()
        if self._read is None:
            raise ValueError("this daemon was started without a file")
        new = await asyncio.to_thread(self._read)
        changed = list(differences(self.settings, new))
        fixed = [(key, old, now) for key, old, now in changed if not may_change(key)]
        if fixed:
            what = ", ".join(f"{key} (from {old!s:.80} to {now!s:.80})" for key, old, now in fixed)
            raise ValueError(f"a restart is needed for {what}")
        short = too_few(limit(), new)
        if short is not None:
            raise ConfigError(new.state_directory, short)
        clients = await self._engines.made_for(new)  # reads the key files, so that nothing below can fail
        await self._engines.replace(clients, new)
        daemon_log.configure(new.log)
        self.settings = new
        self._inbox.post(PolicyChanged(self._inbox.next_id(), policy_of(new)))
        log.info("the configuration was read again", changed=[key for key, _, _ in changed])


def may_change(key: str) -> bool:
    """Whether the value of this key may become another while the daemon runs."""
    return key not in MAY_NOT and key.startswith(MAY_CHANGE)


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each key whose value is another, with both."""
    if isinstance(old, BaseModel) and type(old) is type(new):
        for name in type(old).model_fields:
            yield from differences(getattr(old, name), getattr(new, name), f"{key}.{name}" if key else name)
    elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, f"{key}[{number}]")
    elif isinstance(old, tuple) and isinstance(new, tuple):
        yield key, f"{len(old)} entries", f"{len(new)} entries"
    elif old != new:
        yield key, old, new
