"""A trainer without a table: what it makes its slots from, once the daemon has said what the engines need."""

import logging
from collections.abc import Mapping
from typing import Final

import torch
import torch.distributed as dist
from weightsync.agents.trainer.routes.routes import NeededTable, TrainerModel, route_needs
from weightsync.agents.trainer.slots.slots import SlotOptions
from weightsync.orchestrator.protocol.codec import decode_from_daemon
from weightsync.orchestrator.protocol.messages import Needs

log = logging.getLogger(__name__)

DIGITS: Final = 15
"""Hexadecimal ones of a fingerprint that ranks compare: they fit into the int64 that a collective carries."""


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


def fingerprint_number(needs: Needs | None) -> int:
    """What ranks compare of ``needs``; never 0 for any."""
    return int(needs.fingerprint[:DIGITS], 16) + 1 if needs is not None else 0


def dist_rank(group: dist.ProcessGroup | None) -> int:
    """This rank within ``group``; 0 alone."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0
