"""What the cargo of one write takes: the ring that it is packed in, and what its peers are told and tell."""

from dataclasses import dataclass, field

from weightsync.agents.transport.nixl.cargo import Cargo, CargoChunk
from weightsync.agents.transport.nixl.edge import Edge
from weightsync.agents.transport.nixl.flow import Flow, Packer
from weightsync.agents.transport.nixl.notices import Notice, encode
from weightsync.agents.transport.nixl.ring import PackingRing
from weightsync.orchestrator.protocol.names import RoundName


@dataclass(slots=True)
class Loading:
    """Of one write, of the round ``round``. ``ring`` is None where nothing is packed."""

    round: RoundName
    ring: PackingRing | None
    packer: Packer
    _flows: dict[str, Flow] = field(default_factory=dict)

    def begin(self, peer: str, cargo: Cargo) -> Flow:
        """The flow of an edge's cargo to ``peer``."""
        flow = self._flows[peer] = Flow(peer, cargo, self.ring, self.packer)
        return flow

    def notice(self, edge: Edge, chunk: CargoChunk) -> bytes:
        """What the peer is told with the bytes of ``chunk``: nothing if all of the cargo stays where it lands."""
        assert edge.cargo is not None
        return encode(Notice("landed", self.round, chunk.number)) if edge.cargo.berth.passes else b""

    def heard(self, peer: str, notice: Notice) -> None:
        """What a peer says of this round: that a chunk was scattered."""
        if notice.round == self.round and notice.what == "scattered" and peer in self._flows:
            self._flows[peer].scattered(notice.chunk)
