"""Room for a version in each mode, on this host."""

import pytest
from weightsync.agents.doctor import memory
from weightsync.agents.environment import limits

GB = 10**9


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda: 10 * GB)


@pytest.mark.parametrize(
    ("environ", "weights", "level", "text"),
    [
        ({}, 5 * GB, "ok", "enough for the weights twice"),
        ({}, 6 * GB, "note", "the weights twice take 12.0 GB, and 10.0 GB are free on this host"),
        ({"WEIGHTSYNC_MODE": "live"}, 60 * GB, "ok", "versions go straight into the parameters"),
        ({"WEIGHTSYNC_MODE": "flip"}, 6 * GB, "error", "takes 12.0 GB, and 10.0 GB are free on this host"),
        ({"WEIGHTSYNC_MODE": "copy"}, 5 * GB, "ok", "takes 10.0 GB, and 10.0 GB are free on this host"),
        ({"WEIGHTSYNC_MODE": "copy", "WEIGHTSYNC_LANDING_MIB": "999"}, 1000 << 20, "error", "takes 1000 MiB, and"),
        ({"WEIGHTSYNC_MODE": "copy", "WEIGHTSYNC_LANDING_MIB": "1000"}, 1000 << 20, "ok", "takes 2.1 GB"),
        ({"WEIGHTSYNC_MODE": "fast"}, GB, "error", "WEIGHTSYNC_MODE is 'fast'"),
        ({"WEIGHTSYNC_LANDING_MIB": "some"}, GB, "error", "WEIGHTSYNC_LANDING_MIB is 'some'"),
    ],
)
def test_an_engine(
    environ: dict[str, str], weights: int, level: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WEIGHTSYNC_MODE", "WEIGHTSYNC_LANDING_MIB"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    [found] = memory.room("engine", weights, on_gpu=False)
    assert (found.level, found.check) == (level, "memory")
    assert text in found.what


def test_a_trainers_slots_are_beside_what_is_trained() -> None:
    assert [found.level for found in memory.room("trainer", 10 * GB, on_gpu=False)] == ["ok"]
    assert [found.level for found in memory.room("trainer", 11 * GB, on_gpu=False)] == ["error"]
