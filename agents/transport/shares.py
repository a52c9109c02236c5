"""What one trainer rank owes each peer of a plan: its bytes, how they are cut into runs, and their digest.

All transports need these, whichever way they move the bytes. The digests read all that is owed, so they are also asked
whether it is finite; nothing reads it again for that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from weightsync.agents.errors import AgentError
from weightsync.agents.tables.runs import copied_bytes, digest_table, element_codes, runs
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.kernels.columns import UNSEEN
from weightsync.kernels.digest import PreparedDigest
from weightsync.kernels.digest import prepare as prepare_digest
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, COPY_PEER, Layout, Matrix, as_matrix
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Digest, Member


class PlanMismatch(AgentError):
    """A Connect whose table does not say what it claims. The daemon's fault; only another plan helps."""

    fault = "daemon"


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one peer is owed. Compared by identity: it is the same object for as long as the plan leaves it alone.

    ``copies`` is int64 ``[n, COPY_COLUMNS]``, ``bytes`` what they are worth. ``runs`` is int64 ``[m, RUN_COLUMNS]`` as
    from ``tables.runs``: of what is not packed. They are of rows of ``layout``, whose regions are ``arenas``.
    ``looked``: where the digest looks for what is no finite number.
    """

    peer: Peer
    copies: Matrix
    runs: Matrix
    bytes: int
    digest: PreparedDigest
    looked: Spans
    layout: Layout
    arenas: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found in reading the slots once: the digest of what each peer is owed, and where all is ``finite``."""

    digests: Mapping[Member, Digest]
    finite: Spans


NOT_READ: Final = Reading({}, NOWHERE)


class Shares:
    """The shares of one trainer rank under the present plan.

    ``layout`` and ``arenas`` (uint8, one for each region) are the rank's own. ``replan`` replaces the shares as a
    whole, so that ``read`` on another thread sees the old ones or the new ones.
    """

    def __init__(self, layout: Layout, arenas: Sequence[torch.Tensor]) -> None:
        self._layout = layout
        self._arenas = arenas
        self._plan: tuple[Mapping[Member, Share], Spans] = ({}, NOWHERE)
        # Of its own, so that a digest at a grant does not queue behind the kernels of the training. Slots are complete
        # before they are digested (the trainer synchronises), so there is nothing that it would have to wait for.
        self._stream = torch.cuda.Stream(arenas[0].device) if arenas and arenas[0].is_cuda else None  # type: ignore[no-untyped-call]

    def replan(self, connect: Connect) -> Sequence[Share]:
        """The shares of a new plan, in the order of its peers.

        Raises:
            PlanMismatch: the copies are not worth the bytes that the plan expects, or are for peers it does not name.
            RunTableError: a copy outside this rank's rows.
        """
        copies = as_matrix(connect.copies, COPY_COLUMNS)
        per_peer = [copies[copies[:, COPY_PEER] == number] for number in range(len(connect.peers))]
        if sum(map(len, per_peer)) != len(copies):
            raise PlanMismatch(f"plan {connect.fingerprint}: copies for peers that it does not name")
        size = sum(copied_bytes(own, self._layout) for own in per_peer)
        if size != connect.expected_bytes:
            raise PlanMismatch(
                f"plan {connect.fingerprint}: its copies are worth {size} bytes, not {connect.expected_bytes}"
            )
        parts = zip(connect.peers, per_peer, strict=True)
        shares = {peer.member: self._share(peer, own) for peer, own in parts}
        self._plan = (shares, Spans.union([share.looked for share in shares.values()]))
        return tuple(shares.values())

    @property
    def sizes(self) -> dict[Member, int]:
        """Bytes that each peer is owed."""
        return {member: share.bytes for member, share in self._plan[0].items()}

    def read(self) -> Reading:
        """Digest the bytes that each peer is owed, as the slots hold them now. Waits for the device."""
        shares, looked = self._plan
        with torch.cuda.stream(self._stream):
            for share in shares.values():
                share.digest.launch()  # all queued before the first is waited for
            digests = {member: share.digest.result() for member, share in shares.items()}
            # Where any is not, nothing is known of the rest: whoever asks has to look for it anyway.
            finite = all(share.digest.finite() for share in shares.values())
        return Reading(digests, looked if finite else NOWHERE)

    def _share(self, peer: Peer, copies: Matrix) -> Share:
        old = self._plan[0].get(peer.member)
        if old is not None and old.peer == peer and old.copies.tobytes() == copies.tobytes():
            return old
        logical = digest_table(copies, self._layout)
        codes = element_codes(logical, self._layout)
        looked = Spans.of(logical[codes != UNSEEN])
        with torch.cuda.stream(self._stream):  # its tables are zeroed and uploaded where it will run
            digest = prepare_digest(self._arenas, logical, codes, beside="wire")
        memory = self._layout, self._arenas
        return Share(peer, copies, runs(copies, memory[0]), copied_bytes(copies, memory[0]), digest, looked, *memory)
