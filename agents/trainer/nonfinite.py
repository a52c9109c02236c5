"""What becomes of a version whose converted weights hold NaN or infinity."""

import logging
from typing import Literal, get_args

from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer.errors import NonFiniteWeights
from weightsync.agents.trainer.slots.slots import FilledSlots
from weightsync.orchestrator.protocol.names import Version

log = logging.getLogger(__name__)

OnNonFinite = Literal["refuse", "warn", "allow"]


def known_option(value: OnNonFinite) -> OnNonFinite:
    """``value``, if it is one of the three.

    Raises:
        ValueError: it is something else.
    """
    if value not in get_args(OnNonFinite):
        raise ValueError(f"nonfinite={value!r}; it is one of {', '.join(get_args(OnNonFinite))}")
    return value


def judge_numbers(slots: FilledSlots, option: OnNonFinite, version: Version, finite: Spans = NOWHERE) -> None:
    """Look for NaN and infinity in what was converted, and act as ``option`` says. Waits for the device.

    ``finite``: where a digest has looked already and found none.

    Raises:
        NonFiniteWeights: there are some, and ``option`` is "refuse".
    """
    # "allow" also saves the look.
    found = slots.nonfinite(finite) if option != "allow" else ()
    if found and option == "refuse":
        raise NonFiniteWeights(found)
    if found:
        log.warning("%s: NaN or infinity in %s", version, ", ".join(map(str, found)))
