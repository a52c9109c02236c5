"""What tests of the core need of a fleet: its policy, its members, and a plan by which everybody sends to everybody."""

from collections.abc import Iterable
from typing import Any, Final

from weightsync.orchestrator.core.commands import MakePlan
from weightsync.orchestrator.core.events import PlanFacts
from weightsync.orchestrator.core.policy import EngineConfig, Policy
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import Announce, Connect, NixlSettings
from weightsync.orchestrator.protocol.names import Member

ANNOUNCE: Final = Announce(layout=Layout((), (), b""), lends_name="lends")
"""The core never looks into a layout."""

BYTES_PER_EDGE: Final = 100


def policy_for(engines: Iterable[str], pairs: Iterable[tuple[str, ...]] = (), **more: Any) -> Policy:
    """The policy of a fleet of these engines; names in one tuple of ``pairs`` are one prefill/decode pair."""
    pair_of = {name: f"pair-{number}" for number, pair in enumerate(pairs) for name in pair}
    numbers: dict[str, Any] = {
        "min_engines": 0.5, "patience": 30.0, "together": False, "lease": 0.0, "retry": 300.0, "backoff": 1.0,
        "join": 1800.0, "staged": 120.0, "probe": 10.0, "probe_interval": 5.0, "attach": 20.0,
        "pause": 30.0, "quiesce": 60.0, "transfer": 120.0, "verify": 120.0, "finish": 60.0, "heartbeat": 5.0,
        "lost_after": 3,
    }  # fmt: skip
    return Policy(**{
        "run_id": "unit",
        "run_dir": "/runs/unit",
        "engines": tuple(EngineConfig(name, pair_of.get(name, "")) for name in engines),
        "admission": None,
        "transport": NixlSettings(),
        "fan_out": "trainer",
        "group": None,
        "trainer_world": None,
        **numbers,
        **more,
    })  # fmt: skip


def trainer(number: int = 0) -> Member:
    return Member("trainer", "", number)


def rank(engine: str, number: int = 0) -> Member:
    return Member("inference", engine, number)


def plan_facts(wanted: MakePlan) -> PlanFacts:
    """Everybody sends to everybody, and lends to the same rank; a fingerprint names the plan, its owner, and all
    incarnations."""
    parties = sorted((party.member, party.incarnation) for party in (*wanted.sources, *wanted.targets))
    connects = {
        member: Connect(
            fingerprint=f"{'feed ' if wanted.lends else ''}{wanted.number} {member} {hash(tuple(parties)):x}",
            root="root",
            peers=(),
            copies=b"",
            expected_bytes=BYTES_PER_EDGE * len(wanted.sources),
            lends=wanted.lends and member in {source.member for source in wanted.sources},
            relays=bool(wanted.standby),
            landed=wanted.standby[member].fingerprint if member in wanted.standby else "",
        )
        for member, _ in parties
    }
    flows = {
        (s.member, t.member): BYTES_PER_EDGE
        for s in wanted.sources
        for t in wanted.targets
        if not wanted.lends or s.member.rank == t.member.rank
    }
    return PlanFacts("root", connects, flows, True)
