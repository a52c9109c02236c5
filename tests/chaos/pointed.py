"""A fleet whose daemon can be told where to die or to stop, and whose trainer publishes version after version."""

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet import Fleet, Process, Trainer

POINT_SECONDS = 60.0
"""Until a daemon has come to the point that it waits for."""


@dataclass(frozen=True)
class Restart:
    """Of a daemon in the round for ``step``: when it was signalled, and for how many seconds none listened."""

    step: int
    began: float
    absence: float


class Pointed:
    """Attributes: ``whole``, the fleet; ``step``, the last that was begun; ``committed``, the steps in their order."""

    trainer: Trainer

    def __init__(self, whole: Fleet) -> None:
        self.whole = whole
        self.step = 0
        self.committed: list[int] = []
        self.daemon_env: dict[str, str] = {}
        self._point = whole.directory / "point"

    def take_trainer(self, model_dir: Path, world: int, **options: Any) -> None:
        """Start one, and wait until it is connected."""
        self.trainer = self.whole.start_trainer(model_dir, world, **options)
        assert self.trainer.hear()["ready"]

    def begin(self) -> int:
        """Have the trainer publish the next version, without waiting for it."""
        self.step += 1
        self.trainer.tell(do="publish", step=self.step)
        return self.step

    def kill_daemon(self) -> None:
        """``kill -9``."""
        self._daemon().kill()
        self.wait_daemons_death()

    def wait_daemons_death(self) -> None:
        daemon = self._daemon()
        assert daemon.child is not None
        assert daemon.child.wait(POINT_SECONDS) == -signal.SIGKILL, daemon.tail()

    def wait_daemons_end(self) -> None:
        """It ends by itself, as told."""
        daemon = self._daemon()
        assert daemon.child is not None
        assert daemon.child.wait(POINT_SECONDS) == 0, daemon.tail()

    def restart_daemon_at(self, point: str, signals: Sequence[signal.Signals]) -> Restart:
        """Publish the next version, send the daemon ``signals`` at ``point`` of its round, and start the next one."""
        with self.stopped_at(point) as step:
            began = time.monotonic()
            for number in signals:
                self._daemon().kill(number)
        if signal.SIGKILL in signals:
            self.wait_daemons_death()
        else:
            self.wait_daemons_end()
        ended = time.monotonic()
        self.start_daemon()
        return Restart(step, began, time.monotonic() - ended)

    def start_daemon(self) -> None:
        """One that can be told to signal itself; see ``pointed_daemon``."""
        script = Path(__file__).with_name("pointed_daemon.py")
        self.whole.start_daemon(script, {"WEIGHTSYNC_TEST_POINT": str(self._point), **self.daemon_env})

    def signal_daemon_at(self, point: str, number: str) -> None:
        """Have the running daemon send itself a signal when it comes to ``point``."""
        written = self._point.with_suffix(".new")
        written.write_text(f"{point} {number}")
        written.replace(self._point)

    def wait_daemons_stop(self) -> None:
        """Until the daemon has stopped itself; ``continue_daemon`` lets it go on."""
        child = self._daemon().child
        assert child is not None
        stat = Path(f"/proc/{child.pid}/stat")
        self.whole.until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the daemon to stop itself")

    def continue_daemon(self) -> None:
        self._daemon().kill(signal.SIGCONT)

    def _daemon(self) -> Process:
        assert self.whole.daemon is not None
        return self.whole.daemon

    @contextlib.contextmanager
    def stopped_at(self, point: str) -> Iterator[int]:
        """Publish the next version; inside, the daemon stands still at ``point`` of its round. The version's step."""
        self.signal_daemon_at(point, "SIGSTOP")
        step = self.begin()
        self.wait_daemons_stop()
        try:
            yield step
        finally:
            self.continue_daemon()
