"""The schema of the log: the name of every event with what it means, and every field that a line may have.

Names and fields change with a changelog entry only. A line of a library has its text as its name, and a ``logger`` that
is none of ours.
"""

from typing import Final

FIELDS: Final[dict[str, str]] = {
    "timestamp": "UTC, ISO 8601",
    "level": "debug, info, warning, error or critical",
    "event": "the name, one of the table",
    "run": "run.id",
    "message": "a sentence: what and why",
    "cause": "number of the decision that led to it; lines of one decision have one number",
    "engine": "name of the engine",
    "version": "the version that it is about",
    "round": "the round that it is about",
    "agent": "member and connection",
    "reason": "why, in words",
    "fault": "who has to mend it: trainer, engine, daemon, network or config",
    "exception": "traceback of a bug",
    "logger": "the library that speaks",
    "address": "of who asked", "call": "to an engine", "changed": "keys", "credential": "who asked",
    "audit_hash": "of the audit log's line", "host": "of the listener", "refusals": "event whose lines are counted",
    "limit": "that was reached", "marker": "its kind", "more": "how many were not said", "path": "file or route",
    "port": "of the listener", "problem": "what is wrong with it", "release": "of the daemon", "epoch": "of the daemon",
    "remote": "address of who was turned away", "round_may_take_seconds": "before the daemon ends without it",
    "seconds": "for how long", "state": "what the daemon does and why", "story": "what the daemon did and why",
    "target": "of the verb", "tokens": "how many there are", "verb": "of the operator",
}  # fmt: skip
"""Besides, ``round committed`` and ``round failed`` have the fields of a row of ``/rounds``."""

EVENTS: Final[dict[str, str]] = {
    # The daemon
    "the daemon serves": "it has started and agents can connect",
    "state": "what the daemon does now, and why; said when it changes",
    "the daemon stops": "it was told to, and a round under way may end",
    "told again to stop: the daemon ends at once": "the round under way is not waited for",
    "the round is left to the next start": "it did not end in time",
    "the daemon ends": "nothing that it could do next would be safe",
    "listen.insecure: tokens of viewers and operators can be read on its network": "as configured",
    "the configuration was read again": "after SIGHUP, or because engines_from changed",
    "the configuration is not taken, the old one stays": "it has errors",
    "the credentials were read again": "they had changed",
    "the credentials are not taken, the old ones stay": "they cannot be used",
    "the journal is no longer compacted": "a bug; it grows",
    "note": "what has no name of its own",
    # Rounds and versions
    "round begins": "its engines are frozen",
    "round committed": "the canonical line: what it did and cost",
    "round failed": "the canonical line: what it did, cost, and why it failed",
    "round given up": "why, and what becomes of its engines",
    "engine left out": "the round goes on without it",
    "engine late": "a round begins without it",
    "version failed": "it is not tried again",
    "version staged again": "one that had failed",
    "same bytes": "a version holds what the one before held",
    "rollback refused": "why there is none",
    # Agents and the rendezvous
    "agent refused": "why it is not taken in",
    "agent lost": "its connection has ended",
    "agent gone": "it said good-bye, or stayed away",
    "agent dropped": "it contradicts the protocol",
    "an agent is sent away": "what it said cannot be true",
    "what an agent sent broke its handling": "a bug of ours; it costs the connection",
    "trainer begins": "a new generation",
    "grant over": "a writer that was not closed is, or is dead",
    "rendezvous complete": "everybody has confirmed its edges",
    "tcpstore rendezvous failed": "another one is tried",
    "edge dead": "two members cannot reach each other",
    "plan made": "of how many bytes over how many edges",
    "plan rejected": "layouts do not fit",
    "the planner broke": "a bug, or what no layout should be",
    "needs known": "what engines need together",
    "what the engines need cannot be put together": "a bug, or what no layout should be",
    "tensors left out": "what rounds do not write at an engine, and why",
    "tensors unneeded": "what the trainer has and no engine needs",
    # Engines
    "engine joins": "it is a member", "engine leaves": "it is no member any more",
    "engine forgotten": "by the operator", "engine misfit": "it does not fit the others, or the trainer",
    "engine paused": "outside of a round, and why", "engine resumed": "outside of a round, and why",
    "engine call failed": "a call to it, and why",
    "standby switch": "it switches to what it has beside",
    "the client of an engine broke": "a bug; it costs the call",
    "an engine is not taken in": "one that applied",
    "engine turned away": "one that applied, before it was known",
    # Operators
    "an operator asks": "a verb, and who", "operator holds": "or releases", "operator drains": "an engine",
    "operator maintenance": "on or over", "operator retries": "everything at once",
    "declare-dead refused": "the process is connected",
    # Strangers
    "agent turned away": "before it was known",
    "agent turned away: too many connections": "by the limit",
    "connection turned away": "by its address, or by their number",
    "a stranger has shown nothing": "in time", "a request takes too long": "it is ended",
    "TLS handshake failed": "why",
    "request turned away: wrong or missing token": "of a route", "request turned away: wrong role": "of a route",
    "further refusals": "how many of a kind were not said",
    # The run directory
    "marker stale": "STABLE of an earlier trainer", "marker not believed": "why",
    "marker not written": "why", "the run directory cannot be scanned": "a bug; it is tried again",
    "the run directory is looked at by the clock": "nothing tells of changes",
}  # fmt: skip
