"""The plan for people: what ``plan explain`` says of it, cut to what a page can show."""

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec
from weightsync.orchestrator.daemon.page.timeline import EdgeRate
from weightsync.orchestrator.forecast.explain import EdgeReport, EndReport, Moved, TensorReport, explain
from weightsync.orchestrator.planner import Plan

MAX_EDGES: Final = 4096
MAX_TENSORS: Final = 400
MAX_ENDS: Final = 256
"""Rows of each table; ``plan explain`` shows all."""

BUSY: Final = "a round is under way, which nothing may slow down; the plan is explained when it is over"


class PlanNotExplained(Exception):
    """There is none, or not now. ``status``: of the HTTP answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ExplainedPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A plan in numbers, the largest of each first. ``edge_count``, ``tensor_count``: of all, also those not shown."""

    root: str
    moved: Moved
    seconds: dict[str, float]
    bottleneck: dict[str, str]
    edges: tuple[EdgeReport, ...]
    edge_count: int
    tensors: tuple[TensorReport, ...]
    tensor_count: int
    senders: tuple[EndReport, ...]
    receivers: tuple[EndReport, ...]
    unneeded: tuple[str, ...]


class RatesView(msgspec.Struct, frozen=True):
    """What each edge moved last."""

    edges: tuple[EdgeRate, ...]


class Explained:
    """Explains each plan once; belongs to the loop.

    Args:
        plan: the present one, None before the first.
        busy: a round is under way.
    """

    def __init__(self, plan: Callable[[], Plan | None], busy: Callable[[], bool]) -> None:
        self._plan, self._busy = plan, busy
        self._lock = asyncio.Lock()
        self._known: tuple[str, bytes] = ("", b"")

    async def answer(self) -> bytes:
        """An ExplainedPlan as JSON.

        Raises:
            PlanNotExplained: there is no plan yet (404); a round is under way (503).
        """
        async with self._lock:
            plan = self._plan()
            if plan is None:
                raise PlanNotExplained(404, "there is no plan yet: it is made when trainer and engines have met")
            if self._known[0] != plan.root:
                if self._busy():
                    raise PlanNotExplained(503, BUSY)
                # In a thread: a large plan takes seconds.
                self._known = (plan.root, await asyncio.to_thread(_explained, plan))
            return self._known[1]


def _explained(plan: Plan) -> bytes:
    found = explain(plan)
    return msgspec.json.encode(
        ExplainedPlan(
            root=found.root,
            moved=found.moved,
            seconds=found.seconds,
            bottleneck=found.bottleneck,
            edges=found.edges[:MAX_EDGES],
            edge_count=len(found.edges),
            tensors=found.tensors[:MAX_TENSORS],
            tensor_count=len(found.tensors),
            senders=found.senders[:MAX_ENDS],
            receivers=found.receivers[:MAX_ENDS],
            unneeded=found.unneeded[:MAX_TENSORS],
        )
    )
