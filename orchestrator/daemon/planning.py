"""Runs the planner on what agents announced, and turns its tables into what each agent is told."""

import dataclasses
import time

import msgspec
from weightsync.orchestrator.core.commands import Announced, MakeNeeds, MakePlan
from weightsync.orchestrator.core.events import PlanFacts
from weightsync.orchestrator.daemon.admin.views import LayoutsView, PartyView
from weightsync.orchestrator.planner import CostModel, Party, Plan, make_plan
from weightsync.orchestrator.planner.needs import NeedsFound, union_of_needs
from weightsync.orchestrator.protocol.edges import Peer, reached_fingerprint
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Member


class Planning:
    """Keeps the last plan, so that a joiner costs only its own edges. Blocking; one call at a time."""

    def __init__(self, cost: CostModel | None = None) -> None:
        self._cost = cost
        self.plan: Plan | None = None
        self.announced: dict[Member, Announced] = {}

    def needs(self, command: MakeNeeds) -> NeedsFound:
        """What the engines need together."""
        return union_of_needs(_parties(command.targets))

    def layouts(self, run: str) -> LayoutsView | None:
        """The parties of the present plan; None before the first one."""
        if self.plan is None:
            return None
        parties = tuple(
            PartyView(name=str(one.member), member=one.member, incarnation=one.incarnation, layout=one.announce.layout)
            for one in self.announced.values()
        )
        return LayoutsView(run=run, root=self.plan.root, parties=parties)

    def make(self, command: MakePlan) -> PlanFacts:
        """A proved plan.

        Raises:
            PlanError: the layouts do not make one; its ``member`` names whose does not fit.
        """
        began = time.monotonic()
        if command.lends:
            return self._feed(command, began)
        everybody = {party.member: party for party in (*command.sources, *command.targets)}
        # With the last plan: edges of parties that did not change are taken over from it.
        plan = make_plan(_parties(command.sources), _parties(command.targets), self._cost, self.plan)
        self.plan, self.announced = plan, everybody
        connects = {member: _connect(plan, member, everybody) for member in plan.parts}
        return PlanFacts(plan.root, connects, dict(plan.flows), True, time.monotonic() - began, plan.unneeded)

    def _feed(self, command: MakePlan, began: float) -> PlanFacts:
        """By which engines write to engines: nobody joins it later, and the trainer's plan is not touched."""
        plan = make_plan(_parties(command.sources), _parties(command.targets), self._cost)
        targets = {party.member: party for party in command.targets}
        sources = {party.member: party for party in command.sources}
        everybody = targets | {member: _as_writer(party) for member, party in sources.items()}
        connects = {member: _connect(plan, member, everybody, member in sources) for member in plan.parts}
        return PlanFacts(plan.root, connects, dict(plan.flows), True, time.monotonic() - began)


def _as_writer(party: Announced) -> Announced:
    """An inference rank, reached by the endpoint by which it writes to others."""
    said = party.announce
    lends = msgspec.structs.replace(said, endpoint_name=said.lends_name, endpoint=said.lends)
    return dataclasses.replace(party, announce=lends)


def _parties(announced: tuple[Announced, ...]) -> list[Party]:
    return [Party(one.member, one.incarnation, one.announce.layout) for one in announced]


def _connect(plan: Plan, member: Member, everybody: dict[Member, Announced], lends: bool = False) -> Connect:
    part = plan.part(member)
    peers = tuple(
        Peer(
            member=peer,
            incarnation=everybody[peer].incarnation,
            endpoint_name=everybody[peer].announce.endpoint_name,
            endpoint=everybody[peer].announce.endpoint,
            regions=everybody[peer].announce.layout.regions,
            berth=berth,
        )
        for peer, berth in zip(part.peers, part.berths, strict=True)
    )
    return Connect(
        fingerprint=reached_fingerprint(part.fingerprint, peers),
        root=plan.root,
        peers=peers,
        copies=part.copies,
        expected_bytes=part.expected_bytes,
        lends=lends,
    )
