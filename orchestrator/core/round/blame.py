"""Whose fault it was: an engine that fails in rounds is left out of them for a while, longer each time."""

from typing import Final

from weightsync.orchestrator.core.errors import NO_TROUBLE, Trouble
from weightsync.orchestrator.core.turn import Turn

MAX_BACKOFF_DOUBLINGS: Final = 6
"""Engines and versions are tried for as long as it takes; the pauses stop growing at 64 times the first."""


def backoff(first: float, failures: int) -> float:
    """Seconds to wait after so many failures in a row, ``first`` after one."""
    return first * 2.0 ** min(failures - 1, MAX_BACKOFF_DOUBLINGS)


def put(turn: Turn, engine: str, why: Trouble) -> None:
    """The engine has cost a round its place in it."""
    state = turn.fleet.engines[engine]
    state.failures += 1
    state.retry_at = turn.now + backoff(turn.fleet.policy.backoff, state.failures)
    state.blame, state.blamed_at = why, turn.now


def clear(turn: Turn, engine: str) -> None:
    """It has gone through a round, or is another process."""
    state = turn.fleet.engines[engine]
    state.failures, state.retry_at, state.blame, state.blamed_at = 0, 0.0, NO_TROUBLE, 0.0


def pass_over(turn: Turn, engine: str, lender: str, why: str) -> None:
    """Nothing came of this lender for the engine: for a while somebody else is asked."""
    fleet = turn.fleet
    failures = fleet.engines[engine].failures if engine in fleet.engines else 0
    seconds = fleet.policy.patience + 2 * backoff(fleet.policy.backoff, max(1, failures))
    fleet.passed_over[engine, lender] = turn.now + seconds, why
    turn.say(f"{engine} takes nothing from {lender} for {seconds:.0f} s: {why}", "warning")
