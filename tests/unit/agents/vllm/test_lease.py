"""The dead man's switch by itself: when it asks, when it resumes, and that it ends nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.vllm import lease


class Timer:
    """Runs out when the test says so."""

    def __init__(self, seconds: float, wake: Any) -> None:
        self.seconds, self.wake, self.daemon = seconds, wake, False
        self.started = self.cancelled = False
        made.append(self)

    def start(self) -> None:
        assert self.daemon, "it would keep the engine's process from ending"
        self.started = True

    def cancel(self) -> None:
        self.cancelled = True


made: list[Timer] = []


class Engine:
    def __init__(self) -> None:
        self.left: float | None = None
        self.paused, self.failure, self.asked = True, "", 0
        self.now = 100.0
        self.silent: list[float] = []
        self.lease = lease.Lease(lambda: None, self.ask, lambda: self.paused, self.resume, lambda: self.now)

    def ask(self, silent: float) -> float | None:
        self.asked += 1
        self.silent.append(silent)
        if self.failure:
            raise RuntimeError(self.failure)
        return self.left

    def resume(self) -> None:
        self.paused = False


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made.clear()
    monkeypatch.setattr(lease.threading, "Timer", Timer)
    return Engine()


def test_it_asks_again_and_again_until_the_lease_has_run_out(engine: Engine) -> None:
    engine.lease.arm()
    engine.lease.arm()
    assert len(made) == 1
    for left in (None, 3.0, 0.5):
        engine.left = left
        engine.lease.check()
        assert engine.paused
    assert [timer.seconds for timer in made] == [lease.LOOK_SECONDS] * 4
    engine.left = 0.0
    engine.lease.check()
    assert not engine.paused
    engine.lease.check()
    assert (len(made), engine.asked) == (4, 4), "it is over"


def test_what_the_server_hears_of_the_daemon_counts_too(engine: Engine) -> None:
    engine.lease.arm()
    engine.now += 7.0
    engine.lease.check()
    engine.lease.heard()
    engine.now += 2.0
    engine.lease.check()
    engine.now += 1.0
    engine.lease.arm()
    engine.lease.check()
    assert engine.silent == [7.0, 2.0, 0.0]


def test_an_engine_that_is_not_paused_is_not_asked(engine: Engine) -> None:
    engine.left, engine.paused = -1.0, False
    engine.lease.arm()
    engine.lease.check()
    assert (len(made), engine.asked) == (2, 0)


def test_workers_that_cannot_be_asked_keep_it_paused_and_end_nothing(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.left, engine.failure = -1.0, "out of step"
    engine.lease.arm()
    engine.lease.check()
    assert engine.paused
    engine.failure = ""
    engine.lease.check()
    assert not engine.paused


def test_a_resume_of_somebody_else_disarms_it(engine: Engine) -> None:
    engine.left = -1.0
    engine.lease.arm()
    engine.lease.disarm()
    assert made[0].cancelled
    engine.lease.check()
    assert engine.paused
    engine.lease.disarm()


@pytest.mark.parametrize("core", [SimpleNamespace(), SimpleNamespace(input_queue=object(), dp_group=object())])
def test_there_is_none_without_a_loop_or_in_step_with_others(core: Any) -> None:
    assert lease.lease_of(core, lambda silent: None) is None
