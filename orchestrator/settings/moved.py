"""Keys that a release had and the present one has not, each with what to write instead."""

from typing import Final

from weightsync.orchestrator.settings.problems import Key

MOVED: Final[dict[str, tuple[str, str]]] = {
    "agents_token_file": ("", "remove it: WEIGHTSYNC_TOKEN_FILE in each engine's environment says where its token is"),
    "deadlines.http_seconds": ("", "remove it: each call has the deadline of the wait that it belongs to"),
    "deadlines.rendezvous_seconds": ("deadlines.join_seconds", "remove it: deadlines.join_seconds covers that wait"),
    "listen.token_file": (
        "credentials",
        "name a directory of token files, one for each role, in credentials (weightsync-orchestrator tokens DIR makes"
        " them)",
    ),
    "mode": ("", "remove it: each engine's own start decides how it lands (WEIGHTSYNC_MODE in its environment)"),
    "pause.clear_cache": ("pause.cache", "write pause.cache: recompute for true, pause.cache: keep for false"),
    "retry.attempts": ("retry.give_up_seconds", "say in retry.give_up_seconds for how long a version is tried"),
    "transport.flush_every": ("transport.in_flight_per_peer", "rename it to transport.in_flight_per_peer"),
}
"""Former key → the key that took its place (empty: none did), and what to do."""


def moved(key: Key) -> str:
    """What to do with a former ``key``; empty for one that never was."""
    return MOVED.get(".".join(part for part in key if isinstance(part, str)), ("", ""))[1]
