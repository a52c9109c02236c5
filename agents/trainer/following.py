"""A trainer without a table: what it makes its slots from, once the daemon has said what the engines need."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

import torch
from weightsync.agents.trainer.errors import ConversionTableError
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.routes.routes import NeededTable, TrainerModel, route_needs
from weightsync.agents.trainer.slots.slots import SlotOptions
from weightsync.orchestrator.protocol.codec import decode_from_daemon
from weightsync.orchestrator.protocol.messages import Needs

log = logging.getLogger(__name__)

DIGITS: Final = 15
"""Hexadecimal ones of a fingerprint that ranks compare: they fit into the int64 that a collective carries."""


NEEDS_POLL_SECONDS: Final = 0.1
"""Between two looks for what engines need; they take minutes to start, and a publish seconds."""


class FollowedNeeds:
    """Routes of the needs that slots were made for last.

    Args:
        source: the trainer's model, or its callable.
        config: the transformers configuration of a callable's model, if it is known.
        forward_dtype: see ``treatments``.
        options: of the slots; pipeline and expert parallelism excuse tensors that a rank lacks.

    Attributes:
        made_for: ``fingerprint_number`` of the needs of the present slots; 0 without slots.
    """

    def __init__(
        self, source: object, config: object | None, forward_dtype: torch.dtype | None, options: SlotOptions
    ) -> None:
        self._source, self._config, self._forward_dtype = source, config, forward_dtype
        self._partial = options.pipeline or options.expert_parallel is not None
        self.made_for = 0

    def table(self, message: bytes, state: Mapping[str, torch.Tensor]) -> NeededTable:
        """The table for the needs in ``message``, a frame of the protocol.

        Raises:
            UnsupportedFormat, UnroutableTensors: see ``route_needs``.
        """
        needs = decode_from_daemon(message)
        assert isinstance(needs, Needs)
        model = TrainerModel.of(self._source, self._config, partial=self._partial)
        table = route_needs(needs, state, model, forward_dtype=self._forward_dtype)
        log.info("slots are made for %d tensors that the engines need", len(needs.tensors))
        return table


def followed(
    source: object,
    table: object | None,
    config: object | None,
    forward_dtype: torch.dtype | None,
    options: SlotOptions,
) -> FollowedNeeds | None:
    """What a trainer without a table goes by; None for one that has a table.

    Raises:
        ConversionTableError: a table, and beside it what only trainers without one say.
    """
    if table is None:
        return FollowedNeeds(source, config, forward_dtype, options)
    if config is not None or forward_dtype is not None:
        raise ConversionTableError("config and forward_dtype are for trainers without a table: the table has both")
    return None


def await_needs(
    told: Callable[[], Needs | None], seconds: float, look: Callable[[], None], standing: Callable[[], str]
) -> Needs:
    """What the engines need, once the daemon has said it.

    Args:
        told: what it has said.
        seconds: total deadline.
        look: called meanwhile; what it raises ends the wait.
        standing: what the daemon does at the moment, for the error.

    Raises:
        PublishError: nothing was said in time.
    """
    ends, said = time.monotonic() + seconds, False
    while (needs := told()) is None:
        look()
        if time.monotonic() >= ends:
            raise PublishError(
                f"the daemon did not say within {seconds:g} s what the engines need; it can once every engine is"
                f" attached: {standing() or 'see weightsync-orchestrator status'}"
            )
        if not said:
            log.info("waiting for the engines to say what they need")
        said = True
        time.sleep(NEEDS_POLL_SECONDS)
    return needs


def fingerprint_number(needs: Needs | None) -> int:
    """What ranks compare of ``needs``; never 0 for any."""
    return int(needs.fingerprint[:DIGITS], 16) + 1 if needs is not None else 0
