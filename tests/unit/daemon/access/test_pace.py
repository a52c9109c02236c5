"""How many strangers are served a second."""

from weightsync.orchestrator.daemon.access import pace as paces
from weightsync.orchestrator.daemon.access.pace import Pace, PaceLimits

LIMITS = PaceLimits(burst=10, a_second=2.0, few=3, while_seconds=5.0)


def taken(pace: Pace, address: str, now: float, tries: int = 100) -> int:
    return sum(pace.takes(address, now) for _ in range(tries))


def test_a_burst_then_so_many_a_second() -> None:
    pace = Pace(LIMITS, 100.0)
    assert taken(pace, "a", 100.0) == 10
    assert taken(pace, "a", 102.0) == 4
    assert taken(pace, "a", 102.4) == 0
    assert taken(pace, "a", 1000.0) == 10, "never more than the burst"


def test_who_had_few_is_served_beyond_the_pace() -> None:
    pace = Pace(LIMITS, 100.0)
    assert taken(pace, "a", 100.0) == 10
    assert taken(pace, "b", 100.0) == 3
    assert taken(pace, "b", 100.0) == 0
    assert taken(pace, "a", 100.0) == 0
    assert taken(pace, "b", 100.4) == 0
    assert taken(pace, "c", 104.9) == 9, "what has come by then"
    assert taken(pace, "b", 105.0) == 3, "in the next while again"


def test_who_proves_itself_does_not_count() -> None:
    pace = Pace(LIMITS, 100.0)
    for _ in range(1000):
        assert pace.takes("a", 100.0)
        pace.give_back("a")
    assert taken(pace, "b", 100.0) == 10
    for _ in range(1000):
        assert pace.takes("a", 100.0)
        pace.give_back("a")
    assert taken(pace, "a", 100.0) == 3, "as if it had never come"


def test_the_addresses_that_are_remembered_are_bounded() -> None:
    pace = Pace(LIMITS, 100.0)
    served = sum(pace.takes(str(number), 100.0) for number in range(3 * paces.MAX_ADDRESSES))
    assert served == paces.MAX_ADDRESSES
