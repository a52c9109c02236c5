"""What a rank's rounds leave out, in the bounded form in which it is announced to the daemon for people."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, Literal

from weightsync.agents.recorder.settled import Unrecorded
from weightsync.orchestrator.protocol.layout import LeftOut
from weightsync.orchestrator.protocol.limits import (
    MAX_LEFT_OUT,
    MAX_LEFT_OUT_CHARS,
    MAX_LEFT_OUT_REASONS,
    MAX_NAME_CHARS,
)

NOTHING_NEEDED: Final = "the engine needs nothing of them"
OTHER_REASONS: Final = "for other reasons, which the engine's log has"
_REASONS_OF_A_KIND: Final = MAX_LEFT_OUT_REASONS // 3 - 1
_NUMBER: Final = re.compile(r"\d+")

Kind = Literal["unwritten", "unneeded", "unprobed"]


def left_out(
    unrecorded: Iterable[Unrecorded], unused: Iterable[str], unprobed: Mapping[str, str], needed: Collection[str]
) -> tuple[LeftOut, ...]:
    """What rounds leave out, within the protocol's limits.

    Args:
        unrecorded: bytes of the model that stay as the start left them.
        unused: tensors of the checkpoint of which this rank needs nothing.
        unprobed: name to reason, of parameters of which nobody could look whether they are read.
        needed: tensors of the checkpoint that this rank does need. What is named like one of them but for its numbers
            is most likely another rank's, and comes last, because not all names may be told.
    """
    alike = {_NUMBER.sub("*", name) for name in needed}
    unused = sorted(unused, key=lambda name: _NUMBER.sub("*", name) in alike)
    found = (
        *_by_reason("unwritten", ((entry.name, entry.reason) for entry in unrecorded)),
        *_by_reason("unprobed", unprobed.items()),
        *_by_reason("unneeded", ((name, NOTHING_NEEDED) for name in unused)),
    )
    told, left = [], MAX_LEFT_OUT
    for kind, reason, names in found:
        shown = tuple(name[:MAX_NAME_CHARS] for name in names[:left])
        told.append(LeftOut(kind, reason, shown, len(names)))
        left -= len(shown)
    return tuple(told)


def _by_reason(kind: Kind, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[Kind, str, list[str]]]:
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in pairs:
        told = reason[:MAX_LEFT_OUT_CHARS]
        names[told if told in names or len(names) < _REASONS_OF_A_KIND else OTHER_REASONS].append(name)
    for reason, those in names.items():
        yield kind, reason, those
