"""A plan by which engines write to engines, and what is known of it."""

from dataclasses import dataclass

from weightsync.orchestrator.core.events import PlanFacts
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Member, Version


@dataclass(slots=True)
class Feed:
    """How engines take a version from others that hold the same boxes.

    ``version``: the committed one, which engines that catch up take from those that serve it. None for a *relay*: in
    each round to come they take what the others, its *seeds*, have verified and do not serve yet. ``lenders``: engine →
    who writes to it. ``members``: of all of them, with incarnations. ``standby``: of a relay, the Connect by which each
    rank of a seed is itself written to. ``plan``: None until it is made.
    """

    number: int
    version: Version | None
    lenders: dict[str, str]
    members: frozenset[tuple[Member, int]]
    standby: dict[Member, Connect]
    plan: PlanFacts | None = None
    planned_at: float = 0.0

    def serves(self, other: "Feed") -> bool:
        """Its plan does in the place of one of ``other``: for a relay, also where that has fewer takers."""
        if (self.version, self.standby) != (other.version, other.standby):
            return False
        if self.version is not None:
            return (self.lenders, self.members) == (other.lenders, other.members)
        return other.lenders.items() <= self.lenders.items() and other.members <= self.members

    @property
    def borrowers(self) -> dict[str, str]:
        """Engines that run its edges in the place of the trainer's, and who lends to them."""
        return {} if self.version is None else self.lenders
