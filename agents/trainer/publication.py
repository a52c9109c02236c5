"""A version on its way, and how it may fail."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from weightsync.agents.errors import AgentError
from weightsync.orchestrator.protocol.names import Version


class PublishError(AgentError, RuntimeError):
    """The version was not committed. The message says why and names the rank or engine at fault.

    A RuntimeError too, as training scripts expect of a step that failed.
    """


class BusyError(PublishError):
    """An earlier version still needs the slots: wait for its publication first, then try again."""

    fault = "trainer"
    retry = True


@dataclass(frozen=True, slots=True)
class Publication:
    """Handle of one version. ``wait`` may be called from any thread, and again."""

    version: Version
    _outcome: Future[int] = field(repr=False)

    def wait(self, seconds: float) -> int:
        """The commit sequence number of the version.

        Raises:
            PublishError: FAILED, with the reason; or nothing was decided within ``seconds``.
        """
        try:
            return self._outcome.result(timeout=seconds)
        except TimeoutError:
            raise PublishError(f"{self.version} was neither committed nor failed within {seconds:g} s") from None

    def done(self) -> bool:
        """Whether the fate of the version is known."""
        return self._outcome.done()
