"""TrainerAgent on real gloo ranks beside a real daemon: one door for all settings, and no rank waits for a lost one."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from trainer_ranks import CONFIG, Run, daemon, in_processes, weights
from weightsync.agents.trainer.agent import PublishError, TrainerAgent
from weightsync.agents.trainer.errors import AdapterError
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.options import TrainerSettingsError
from weightsync.agents.trainer.slots import SlotOptions
from weightsync.orchestrator.protocol.markers import decode_manifest

pytestmark = pytest.mark.e2e  # ranks in processes of their own, and a daemon: seconds each

WITHIN = 5.0
"""Seconds in which every rank hears of another one's end."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A daemon that waits for its engine for as long as a test lasts."""
    with daemon(tmp_path_factory.mktemp("run") / "d") as made:
        yield made


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A daemon that fails a version whose engine has not come within a second."""
    with daemon(tmp_path_factory.mktemp("impatient") / "d", join_seconds=1) as made:
        yield made


# ------------------------------------------------------------------------------------------------------- the settings
def test_a_wrong_run_dir_is_told_at_once_with_both_paths(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TrainerSettingsError, match=rf"{tmp_path}/none is no directory .* watches {run.run_dir}"):
        run.agent(run_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with run.agent(run_dir=str(tmp_path)):
        pass
    assert f"run_dir is {tmp_path} here, the daemon watches {run.run_dir}" in caplog.text
    caplog.clear()
    (tmp_path / "link").symlink_to(run.run_dir)
    with run.agent(run_dir=tmp_path / "link"):
        pass
    assert "run_dir is" not in caplog.text


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (True, "got the bool True"),
        (torch.tensor(True), "bool"),
        (np.bool_(True), "must be an integer"),
        (1.0, "must be an integer, got float 1.0"),
        (-1, "must be from 0 to"),
        (10**18, "must be from 0 to"),
    ],
)
def test_a_step_that_is_none_is_refused_before_anything(run: Run, step: object, words: str) -> None:
    with run.agent() as agent, pytest.raises(PublishError, match=words):
        agent.publish(step)  # type: ignore[arg-type]
    assert not (run.run_dir / "broadcasts").exists() or not list((run.run_dir / "broadcasts").glob("step_1*"))


def test_an_adapter_alone_is_of_a_peft_model_and_without_a_table(run: Run) -> None:
    with pytest.raises(AdapterError, match="'policy': adapter= is for a peft model"):
        run.agent(adapter="policy")
    peft_model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(AdapterError, match="'default': adapter= publishes it alone; table= and lora="):
        TrainerAgent(peft_model, model_table(CONFIG), adapter="default")


# ---------------------------------------------------------------------------------------------------------- the ranks
def whole_and_sharded(rank: int, members: list[int]) -> tuple[dict[str, torch.Tensor], dist.ProcessGroup | None]:
    """FSDP2-like rows over the ranks ``members``, and their group; all ranks of the job make it."""
    group = dist.new_group(members)
    if rank not in members:
        return {}, None
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp_shard",))
    return {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in weights().items()}, group


def publish_on_some(rank: int, run: Run) -> dict[str, int]:
    """Ranks 1 and 2 of three are the trainer; the tensors that each owns, in bytes."""
    state, group = whole_and_sharded(rank, [1, 2])
    if group is None:
        return {}
    with run.agent(state, process_group=group) as agent:
        publication = agent.publish_async(np.int64(7))
        assert publication.version.step == 7
        assert type(publication.version.step) is int
        return {e.tensor.name: e.box.volume for e in agent.slots.entries()}


def test_a_part_of_the_jobs_ranks_is_a_trainer_and_every_tensor_has_an_owner(run: Run) -> None:
    nobody, first, second = in_processes(3, publish_on_some, run)
    assert (nobody.error, first.error, second.error) == ("", "", ""), (first.text, second.text)
    assert nobody.value == {}
    assert first.value.keys() | second.value.keys() == weights().keys()
    assert not first.value.keys() & second.value.keys()
    marker = decode_manifest((run.run_dir / "broadcasts" / "step_7" / "STABLE").read_bytes())
    assert marker is not None
    assert marker.step == 7


def make_and_lack(rank: int, run: Run, what: str) -> float:
    """The constructor, wrong on rank 1 in one way."""
    state, others, began = weights(), {}, time.monotonic()
    if rank == 1 and what == "tensor":
        del state["model.norm.weight"]
    elif rank == 1 and what == "no file":
        others["token_file"] = "nowhere"
    elif rank == 1 and what == "token":
        other = run.directory / "other-token"
        other.write_text("0" * 32)
        other.chmod(0o600)
        others["token_file"] = other
    elif rank == 1 and what == "run":
        others["run_id"] = "another"
    elif rank == 1 and what == "memory":
        state["model.norm.weight"] = Huge.__new__(Huge)
    run.agent(state, **others).close()
    return time.monotonic() - began


class Huge(torch.Tensor):
    """Nothing can be asked of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise MemoryError("no room")


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("tensor", "MissingTensor", "model.norm.weight"),
        ("no file", "TokenError", "nowhere"),
        ("token", "TimeoutError", "rejects the token (401)"),
        ("run", "ReplicaFailed", "another"),
        ("memory", "MemoryError", "no room"),
    ],
)
def test_a_rank_that_cannot_start_is_named_to_all(run: Run, what: str, kind: str, words: str) -> None:
    first, second, third = in_processes(3, make_and_lack, run, what)
    assert second.error == kind, second.text
    assert words in second.text
    for other in (first, third):
        assert other.error == "ReplicaFailed"
        assert "rank 1" in other.text
        assert words in other.text
        assert abs(other.at - second.at) < WITHIN


def interrupt(rank: int, run: Run, who: int, number: int) -> None:
    """All wait for an engine that never comes; ``who`` gets a signal meanwhile."""
    signal.signal(signal.SIGTERM, lambda *_: exit_now())
    with run.agent() as agent:
        if rank == who:
            threading.Timer(2.0, os.kill, (os.getpid(), number)).start()
        agent.publish(1)


def exit_now() -> None:
    raise SystemExit(7)


@pytest.mark.parametrize(
    ("who", "number", "kind"), [(1, signal.SIGINT, "KeyboardInterrupt"), (0, signal.SIGTERM, "SystemExit")]
)
def test_an_interrupt_of_one_rank_ends_the_publish_of_all(run: Run, who: int, number: int, kind: str) -> None:
    said = in_processes(3, interrupt, run, who, number)
    assert said[who].error == kind
    for rank, other in enumerate(said):
        if rank != who:
            assert other.error == "PublishError"
            assert f"rank {who}: {kind}" in other.text
            assert abs(other.at - said[who].at) < WITHIN


def fail_in_publish(rank: int, run: Run, what: str) -> tuple[list[str], int]:
    """A publish that one rank cannot take part in, and then a good one."""
    state, heard = weights(), []
    with run.agent(state) as agent:
        norm = state["model.norm.weight"]
        if rank == 1 and what == "shape":
            state["model.norm.weight"] = torch.zeros(3)
        step = 100 + rank if what == "step" else 100
        try:
            agent.publish(step)
        except PublishError as error:
            heard.append(f"{type(error).__name__}: {error}")
        state["model.norm.weight"] = norm
        return heard, agent.publish_async(101).version.step


@pytest.mark.parametrize(("what", "words"), [("shape", "rank 1: ChangedTensor"), ("step", "rank 1 publishes step 101")])
def test_what_one_rank_cannot_publish_no_rank_does_and_the_next_step_goes_on(run: Run, what: str, words: str) -> None:
    for said in in_processes(2, fail_in_publish, run, what):
        assert said.error == "", said.text
        heard, then = said.value
        assert [words in text for text in heard] == [True]
        assert heard[0].startswith("PublishError")
        assert then == 101


def drift(rank: int, run: Run, replicas: Any) -> tuple[list[str], bool]:
    """A publish of ranks that hold all alike but for one tensor, and then one of ranks that hold all alike."""
    state, heard = weights(), []
    with run.agent(state, options=SlotOptions(staging_bytes=0, replicas=replicas)) as agent:
        norm = state["model.norm.weight"]
        state["model.norm.weight"] = norm + rank
        try:
            agent.publish_async(200)
        except PublishError as error:
            heard.append(str(error))
        state["model.norm.weight"] = norm
        return heard, agent.publish_async(201).version.step == 201 if heard else True


def test_ranks_that_hold_other_values_of_one_tensor_publish_nothing(run: Run) -> None:
    for said in in_processes(3, drift, run, "compare"):
        assert said.error == "", said.text
        heard, then = said.value
        assert then
        assert "ranks 0 and 1 hold different values of model.norm.weight: engines would be sent a mixture" in heard[0]
    assert not (run.run_dir / "broadcasts" / "step_200" / "STABLE").exists()
    assert [said.value for said in in_processes(2, drift, run, "trust")] == [([], True)] * 2


def from_local(rank: int, run: Run) -> None:
    """Shards of 2 rows and of 1, of which no rank says the whole shape: one sees 4 rows, the other 2."""
    mesh = DeviceMesh("cpu", [0, 1])
    state = {
        name: DTensor.from_local(full.chunk(2)[rank], mesh, [Shard(0)], run_check=False)
        for name, full in {**weights(), "model.norm.weight": torch.ones(3)}.items()
    }
    run.agent(state)


def test_ranks_that_see_other_global_shapes_do_not_gather(run: Run) -> None:
    for said in in_processes(2, from_local, run):
        assert "ranks 0 and 1 would not gather the same of model.norm.weight: all ranks of a mesh" in said.text


def busy_on_one(rank: int, run: Run, seconds: float) -> tuple[str, bool, list[bool]]:
    """Something is in flight from rank 1's slots when the next version is due, and for ``seconds`` from then.

    The error; whether the slots still hold the version before; whether grants wait at each of this rank's looks.
    """
    with run.agent(publish_seconds=1.0) as agent:
        publication = agent.publish_async(5)
        assert agent._agent is not None
        side = agent._agent.side
        agent._last = None  # as if its fate were known
        looks, ends, free = [], time.monotonic() + seconds, side.reserve

        def reserve() -> str:
            looks.append(side._reserved)
            if rank == 1 and time.monotonic() < ends:
                return "edge to e2/0 has not ended (round 1.1)"
            return free()

        side.reserve = reserve  # type: ignore[method-assign]
        error = ""
        try:
            agent.publish_async(6)
        except PublishError as caught:
            error = type(caught).__name__
        dist.barrier()
        return error, agent._agent.call(lambda: side.status().staged) == publication.version, looks


def test_a_busy_rank_makes_all_wait_and_none_forgets_what_its_slots_hold(run: Run) -> None:
    for said in in_processes(2, busy_on_one, run, 60.0):
        assert said.value[:2] == ("BusyError", True), said.text


def test_all_ranks_begin_when_the_last_write_from_the_slots_has_ended(run: Run) -> None:
    for said in in_processes(2, busy_on_one, run, 0.3):
        error, same, looks = said.value
        assert (error, same) == ("", False), said.text
        assert len(looks) > 3
        assert not any(looks), "grants do not wait on one rank while they are carried out on the other"


def publish_again(rank: int, run: Run) -> list[str]:
    """A version that FAILED for lack of engines is published three times in a row."""
    heard = []
    with run.agent() as agent:
        for _ in range(3):
            try:
                agent.publish(9)
            except PublishError as error:
                heard.append(f"{type(error).__name__}: {error}")
    return heard


def test_a_step_that_failed_may_be_published_again(impatient: Run) -> None:
    step = impatient.run_dir / "broadcasts" / "step_9"
    for said in in_processes(2, publish_again, impatient):
        assert said.error == "", said.text
        assert len(said.value) == 3
        for text in said.value:
            assert text.startswith("PublishError")
            assert "nobody" in text
    log = (impatient.directory / "daemon.log").read_text()
    assert log.count("which had failed, is staged again") == 2
    failed, stable = (decode_manifest((step / kind).read_bytes()) for kind in ("FAILED", "STABLE"))
    assert failed is not None
    assert stable is not None
    assert (failed.restaged, stable.restaged) == (2, 2)
