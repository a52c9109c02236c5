"""The credentials that count at this moment. Belongs to the daemon's loop."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import structlog
from weightsync.orchestrator.daemon.run_directory.watcher import wakes
from weightsync.orchestrator.protocol.proof import key_of
from weightsync.orchestrator.settings.credentials import Credential, read_credentials, tokens_of_engines
from weightsync.orchestrator.settings.problems import ConfigError

log = structlog.get_logger(__name__)


class Credentials:
    """Read from ``directory``, and read again whenever it changes; ``withhold`` keeps each token out of the log.

    Attributes:
        changed: called after other tokens count than before; whoever was let in by one that is gone has to go.

    Raises:
        ConfigError: a file cannot serve.
    """

    def __init__(self, directory: Path, withhold: Callable[[str], None]) -> None:
        self._directory, self._withhold = directory, withhold
        self.changed: Callable[[], None] = lambda: None
        self._trouble = ""
        self._tokens: dict[str, Credential] = {}
        self._keys: dict[str, str] = {}
        self._of_engines: dict[str, tuple[str, ...]] = {}
        self._take(read_credentials(directory))

    def of_bearer(self, token: str) -> Credential | None:
        """What ``token`` allows; None: nothing."""
        # Looked up by what only the whole token gives, so that the time taken tells nothing of those there are.
        known = self._keys.get(key_of(token)) if token.isascii() else None  # a header may have bytes that are no text
        return None if known is None else self._tokens[known]

    def of_key(self, key: str) -> tuple[str, Credential] | None:
        """The token with this key (``protocol/proof.py``) and what it allows."""
        token = self._keys.get(key)
        return None if token is None else (token, self._tokens[token])

    def of_engine(self, name: str) -> tuple[str, ...]:
        """The tokens that the engine of this name may hold."""
        return (*self._of_engines.get(name, ()), *self._of_engines.get("", ()))

    def holds(self, token: str) -> bool:
        """Whether ``token`` still counts."""
        return token in self._tokens

    async def again(self) -> None:
        """Read the directory again and take all of it, or nothing.

        Raises:
            ConfigError: a file cannot serve.
        """
        found = await asyncio.to_thread(read_credentials, self._directory)
        if found != self._tokens:
            self._take(found)
            log.info("the credentials were read again", tokens=len(found))
            self.changed()

    async def watch(self, rescan_seconds: float) -> None:
        """Read again whenever the directory changes; until cancelled. What cannot serve is said once."""
        async with contextlib.aclosing(wakes(self._directory, rescan_seconds)) as woken:
            async for _ in woken:
                trouble = ""
                try:
                    await self.again()
                except ConfigError as error:
                    trouble = str(error)
                if trouble and trouble != self._trouble:
                    log.error("the credentials are not taken, the old ones stay", reason=trouble)
                self._trouble = trouble

    def _take(self, found: dict[str, Credential]) -> None:
        for token in found:
            self._withhold(token)
        self._tokens, self._keys = found, {key_of(token): token for token in found}
        self._of_engines = tokens_of_engines(found)
