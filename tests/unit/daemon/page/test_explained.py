"""The plan for people: each plan once, and never while a round is under way."""

import asyncio
from typing import Any

import msgspec
import pytest
from weightsync.orchestrator.daemon.page import explained as module
from weightsync.orchestrator.daemon.page.explained import Explained, ExplainedPlan, PlanNotExplained


async def test_it_says_what_plan_explain_says(plan: Any) -> None:
    found = msgspec.json.decode(await Explained(lambda: plan, lambda: False).answer(), type=ExplainedPlan)
    assert found.root == plan.root
    assert found.moved.bytes == plan.bytes
    assert [(edge.source, edge.target) for edge in found.edges] == [
        ("trainer/0", "a/0"), ("trainer/0", "b/0"), ("trainer/1", "a/0"), ("trainer/1", "b/0"),
    ]  # fmt: skip
    assert (found.edge_count, found.tensor_count) == (4, 2)
    assert [(end.member, end.peers) for end in found.receivers] == [("a/0", 2), ("b/0", 2)]


async def test_a_plan_is_explained_once_and_asked_for_by_many(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    whole = module.explain
    monkeypatch.setattr(module, "explain", lambda of: (times.append(of), whole(of))[1])
    one = Explained(lambda: plan, lambda: False)
    answers = await asyncio.gather(*(one.answer() for _ in range(5)))
    assert len(times) == 1
    assert len(set(answers)) == 1


async def test_during_a_round_only_what_is_known_is_told(plan: Any) -> None:
    busy = [True]
    one = Explained(lambda: plan, lambda: busy[0])
    with pytest.raises(PlanNotExplained, match="a round is under way") as refused:
        await one.answer()
    assert refused.value.status == 503
    busy[0] = False
    told = await one.answer()
    busy[0] = True
    assert await one.answer() == told


async def test_before_the_first_plan_there_is_none() -> None:
    with pytest.raises(PlanNotExplained, match="no plan yet") as refused:
        await Explained(lambda: None, lambda: False).answer()
    assert refused.value.status == 404


async def test_tables_are_cut_and_counted(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_EDGES", "MAX_TENSORS", "MAX_ENDS"):
        monkeypatch.setattr(module, name, 1)
    found = msgspec.json.decode(await Explained(lambda: plan, lambda: False).answer(), type=ExplainedPlan)
    assert [len(rows) for rows in (found.edges, found.tensors, found.senders, found.receivers)] == [1, 1, 1, 1]
    assert (found.edge_count, found.tensor_count) == (4, 2)
