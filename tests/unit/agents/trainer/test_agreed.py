"""One conclusion on all ranks, whatever each of them has heard."""

import pytest
from weightsync.agents.trainer.agreed import COMMITTED, FAILED, agreed_end, agreed_staging, agreed_start
from weightsync.agents.trainer.errors import ReplicaFailed
from weightsync.agents.trainer.publication import PublishError


def test_a_version_that_one_rank_heard_to_be_committed_is() -> None:
    assert agreed_end((f"{FAILED}not within 5 s", f"{COMMITTED}12", "")) == 12


def test_else_the_first_reason_counts() -> None:
    with pytest.raises(PublishError, match=r"^no plan fits$"):
        agreed_end(("", f"{FAILED}no plan fits", f"{FAILED}another"))
    with pytest.raises(PublishError, match="no rank has an agent"):
        agreed_end(("", ""))


def test_ranks_without_an_agent_do_not_know_how_often_a_step_was_staged() -> None:
    assert agreed_staging(("7 2 ", "7 0 ", "7 2 ")) == (2, "")


def test_slots_that_one_rank_still_writes_from_are_free_on_none() -> None:
    in_use = "edge to e0/0 has not ended (round 1.2)"
    assert agreed_staging(("7 0 ", f"7 0 {in_use}", "7 0 ")) == (0, in_use)


def test_different_steps_are_nobodys() -> None:
    with pytest.raises(PublishError, match="rank 2 publishes step 8, rank 0 step 7: give all ranks one step"):
        agreed_staging(("7 0 ", "7 0 ", "8 0 "))


def test_the_first_rank_draws_the_generation_of_all() -> None:
    assert agreed_start(("77 ws://d:1/agents run", "5 ws://d:1/agents run")) == 77


def test_a_rank_of_another_run_is_named_with_both() -> None:
    with pytest.raises(
        ReplicaFailed, match=r"rank 1: .*'ws://d:1/agents other', those of rank 0 .*'ws://d:1/agents run'"
    ):
        agreed_start(("77 ws://d:1/agents run", "5 ws://d:1/agents other"))
