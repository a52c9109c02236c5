"""How many strangers are served a second."""

from dataclasses import replace

from weightsync.orchestrator.daemon.access import pace as paces
from weightsync.orchestrator.daemon.access.pace import Pace, PaceLimits

LIMITS = PaceLimits(burst=10, a_second=2.0, besieged=1.0, few=3, beyond=4.0, while_seconds=5.0)


def takes(pace: Pace, address: str, now: float) -> bool:
    served = pace.serves(address, now)
    if served:
        pace.takes(address)
    return served


def taken(pace: Pace, address: str, now: float, tries: int = 100) -> int:
    return sum(takes(pace, address, now) for _ in range(tries))


def test_a_burst_then_so_many_a_second() -> None:
    pace = Pace(LIMITS, 100.0)
    assert taken(pace, "a", 100.0, 10) == 10
    assert taken(pace, "a", 102.0, 4) == 4
    assert not pace.is_besieged
    assert taken(pace, "a", 102.4) == 0
    assert taken(pace, "a", 1000.0) == 10, "never more than the burst"


def test_a_siege_lasts_until_fewer_come_for_a_while() -> None:
    pace = Pace(LIMITS, 100.0)
    assert taken(pace, "a", 100.0, 11) == 10
    assert pace.is_besieged
    assert taken(pace, "a", 102.0) == 2, "one a second"
    assert taken(pace, "a", 105.0) == 3, "which are its few of the new while, too"
    assert pace.is_besieged
    assert taken(pace, "a", 109.9, 10) == 4
    assert taken(pace, "a", 114.9, 1) == 1
    assert pace.is_besieged, "110 came in the while before"
    assert taken(pace, "a", 119.9, 1) == 1
    assert not pace.is_besieged
    assert taken(pace, "a", 121.9, 12) == 10


def test_more_than_the_pace_for_a_while_are_a_siege_although_each_is_turned_away_for_something_else() -> None:
    """One address beyond its places."""
    pace = Pace(LIMITS, 100.0)
    assert all(pace.serves("a", 100.0) for _ in range(11))
    assert not pace.is_besieged
    assert pace.serves("a", 105.0)
    assert pace.is_besieged


def test_who_had_few_is_served_beyond_the_pace() -> None:
    pace = Pace(LIMITS, 100.0)
    assert taken(pace, "a", 100.0) == 10
    assert taken(pace, "b", 100.0) == 3
    assert taken(pace, "b", 100.0) == 0
    assert taken(pace, "a", 100.0) == 0
    assert taken(pace, "b", 100.4) == 0
    assert taken(pace, "c", 100.4) == 2, "four a second of all of them"
    assert taken(pace, "d", 101.4) == 3, "one of the siege's, and the rest of its few"


def test_who_proves_itself_does_not_count() -> None:
    pace = Pace(LIMITS, 100.0)
    for _ in range(1000):
        assert takes(pace, "a", 100.0)
        pace.give_back("a", False)
    assert taken(pace, "b", 100.0) == 10
    for _ in range(1000):
        assert pace.serves("a", 100.0)
        assert pace.takes("a"), "beyond"
        pace.give_back("a", True)
    assert taken(pace, "b", 100.0) == 0, "no stranger comes in for those who are none"
    assert taken(pace, "a", 100.0) == 3, "as if it had never come"


def test_the_addresses_that_are_remembered_are_bounded() -> None:
    pace = Pace(replace(LIMITS, beyond=1e6), 100.0)
    served = sum(takes(pace, str(number), 100.0) for number in range(3 * paces.MAX_ADDRESSES))
    assert served == paces.MAX_ADDRESSES
    assert taken(pace, "11", 100.0) == 2, "one that is remembered has the rest of its few"


def test_of_dearer_ones_fewer_come() -> None:
    dear = LIMITS.of_dearer(4.0)
    assert dear == PaceLimits(burst=2, a_second=0.5, besieged=0.25, few=3, beyond=1.0, while_seconds=5.0)
    pace = Pace(dear, 100.0)
    assert taken(pace, "a", 100.0) == 3, "the burst, and one beyond it"
    assert taken(pace, "b", 101.0) == 1, "who had few comes in, however dear"
    assert LIMITS.of_dearer(1e9).burst == 1
