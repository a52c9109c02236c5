"""One edge, from a trainer rank to a peer: where the peer is, what one grant moved to it, and why it cannot be used."""

from typing import Annotated

import msgspec
from weightsync.orchestrator.protocol.fields import Count, Endpoint, Name, Nonce, Reason, Seconds, Spoken
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.limits import MAX_TENSORS
from weightsync.orchestrator.protocol.names import Digest, Member


class Peer(msgspec.Struct, frozen=True):
    """The other end of an edge; ``berth``: where the edge's cargo lands, None without one."""

    member: Member
    incarnation: Nonce
    endpoint_name: Name
    endpoint: Endpoint
    regions: Annotated[tuple[Region, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    berth: Berth | None = None


class PeerTransfer(Spoken, frozen=True):
    """What one grant moved to one peer; ``seconds`` from the first post to the last DONE, ``digest`` of those bytes.

    With ``error`` the peer did not get all of it, and no handle of the grant to it is pending any more.
    """

    peer: Member
    bytes: Count
    descriptors: Count
    seconds: Seconds
    digest: Digest
    error: Reason = ""
    spoken = ("error",)


class EdgeFailure(Spoken, frozen=True):
    """An edge that cannot be used now, and why."""

    peer: Member
    error: Reason
    spoken = ("error",)
