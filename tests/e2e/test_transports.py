"""The other transport and the other rendezvous: the same rounds, and the same answers bit for bit."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fleet import Fleet, fleet
from ports import HOST, free_port
from reference import plain, reference_answers
from serving import VllmServer, answers
from tiny_models import tiny_qwen3
from weightsync.orchestrator.planner import Party, make_plan
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.names import Member

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = (1, 2)


def reference_of(whole: Fleet, model: Path) -> list[list[Any]]:
    """What the checkpoints that the trainer saved at STEPS answer."""
    return reference_answers(model, [whole.checkpoints / f"step_{step}" for step in STEPS], whole.directory)


@pytest.fixture(scope="module")
def server(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """One engine for all fleets of this module; each daemon takes it over from the one before."""
    engine = VllmServer(qwen3, log=tmp_path_factory.mktemp("transports") / "vllm.log").start()
    yield engine
    engine.close()


def test_a_checkpoint_on_disk_arrives_as_the_wire_would_bring_it(
    server: VllmServer, qwen3: Path, tmp_path: Path
) -> None:
    """``transport: filesystem``: the engine reads broadcasts/step_<N> inside the round, digests and all."""
    with fleet(tmp_path / "fleet", {"engine": server}, settings={"transport": {"type": "filesystem"}}) as whole:
        trainer = whole.start_trainer(qwen3)
        server.wait_ready()
        assert trainer.hear()["ready"]
        served = []
        for step in STEPS:
            assert trainer.publish(step)["sequence"] == step
            served.append(plain(answers(server)))
            assert list((whole.directory / "run" / "broadcasts" / f"step_{step}").glob("part-*.safetensors"))
        assert served[0] != served[1]
        assert [row["descriptors"] for row in whole.ask("/rounds")["rounds"]] == [0, 0]
        assert served == reference_of(whole, qwen3)


def passing(whole: Fleet) -> list[Berth]:
    """The berths of the present plan that chunks pass."""
    parties = []
    for one in whole.ask("/plan/layouts")["parties"]:
        layout = msgspec.convert({**one["layout"], "rows": base64.b64decode(one["layout"]["rows"])}, Layout)
        parties.append(Party(msgspec.convert(one["member"], Member), one["incarnation"], layout))
    by_role = [[party for party in parties if party.member.role == role] for role in ("trainer", "inference")]
    berths = [berth for part in make_plan(*by_role).parts.values() for berth in part.berths if berth is not None]
    return [berth for berth in berths if berth.passes]


def test_what_a_landing_does_not_hold_passes_it_while_the_engine_stands_still(tmp_path: Path) -> None:
    """Some 3 MiB of small matrices through a landing of 1 MiB, written into the weights of an engine that is paused."""
    model = tiny_qwen3(tmp_path / "model", 11, hidden_size=256, num_hidden_layers=8)
    env = {"WEIGHTSYNC_MODE": "live", "WEIGHTSYNC_LANDING_MIB": "1"}
    small = VllmServer(model, env=env, log=tmp_path / "vllm.log").start()
    try:
        with fleet(tmp_path / "fleet", {"engine": small}) as whole:
            trainer = whole.start_trainer(model)
            small.wait_ready()
            assert trainer.hear()["ready"]
            served = []
            for step in STEPS:
                assert trainer.publish(step)["sequence"] == step
                served.append(plain(answers(small)))
            berths = passing(whole)
            assert {berth.chunks > berth.places for berth in berths} == {True}
            assert served[0] != served[1]
            assert served == reference_of(whole, model)
    finally:
        small.close()


def root_of(whole: Fleet) -> str:
    """Of the present plan: a hash over every party's layout and incarnation and every agent's copies."""
    return str(whole.ask("/plan/layouts")["root"])


def test_vllms_own_group_makes_the_plan_that_the_hub_makes(server: VllmServer, qwen3: Path, tmp_path: Path) -> None:
    """``rendezvous: tcpstore`` with two trainer ranks. Then a daemon with the hub, and the very same processes.

    The plan's root covers the incarnations, so it is only comparable because no process is restarted.
    """
    group = {"type": "tcpstore", "host": HOST, "port": free_port(), "timeout_seconds": 120}
    server.wait_ready()
    with fleet(tmp_path / "fleet", {"engine": server}, settings={"rendezvous": group}) as whole:
        trainer = whole.start_trainer(qwen3, world=2)
        assert trainer.hear()["ready"]
        assert trainer.publish(1, seed=1)["sequence"] == 1
        over_group, root = plain(answers(server)), root_of(whole)
        whole.restart_daemon(rendezvous={"type": "hub"})
        assert trainer.publish(2, seed=2)["sequence"] == 2
        assert root_of(whole) == root
        other = plain(answers(server))
        assert trainer.publish(3, seed=1)["sequence"] == 3
        assert plain(answers(server)) == over_group != other
        assert [over_group, other] == reference_of(whole, qwen3)
