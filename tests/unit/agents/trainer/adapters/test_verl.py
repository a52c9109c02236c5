"""verl's two seams, against the parts of verl 0.9.1 in tests/verl_0_9_1."""

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_ranks import CONFIG
from weightsync.agents.trainer.publication import PublishError
from weightsync.orchestrator.protocol.token import TokenError

PARTS = Path(__file__).resolve().parents[4] / "verl_0_9_1"
MODULE = "weightsync.agents.trainer.adapters.verl"


class Mode(Enum):
    """verl's RolloutMode."""

    HYBRID = "hybrid"
    COLOCATED = "colocated"
    STANDALONE = "standalone"


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    sys.path.insert(0, str(PARTS))
    import importlib

    yield importlib.import_module(MODULE)
    sys.path.remove(str(PARTS))


@pytest.fixture
def engine(adapter: ModuleType, tmp_path: Path) -> Any:
    """As an actor's worker makes it: by name, from the configuration's keywords."""
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    given = {"hub_url": "ws://127.0.0.1:9/agents", "run_id": "r", "run_dir": str(tmp_path), "model_config": CONFIG}
    return lambda master: CheckpointEngineRegistry.new(
        "weightsync", is_master=master, bucket_size=1 << 31, token_file=str(token), **given
    )


def codes(passed: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("a", "b"):
        yield name, torch.ones(2, dtype=torch.uint8)
        passed.append(name)


def test_only_the_master_publishes_and_all_take_part_in_the_gathering(engine: Any) -> None:
    passed: list[str] = []
    assert asyncio.run(engine(False).send_weights(codes(passed), global_steps=3)) == {}
    master = engine(True)
    with pytest.raises(PublishError, match=r"step 3 .*'a' is uint8; "):
        asyncio.run(master.send_weights(codes(passed), global_steps=3))
    with pytest.raises(PublishError, match=r"step 4 .*'a' is uint8; "):
        asyncio.run(master.send_weights(codes(passed)))  # verl counts no step here: the next one
    assert passed == ["a", "b"] * 3
    master.finalize()


def test_a_master_without_its_token_takes_part_in_the_gathering_all_the_same(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "token").unlink()
    passed: list[str] = []
    with pytest.raises(TokenError):
        asyncio.run(engine(True).send_weights(codes(passed), global_steps=3))
    assert passed == ["a", "b"]


def test_rounds_of_the_stock_manager_are_refused_with_the_setting_that_is_lacking(engine: Any) -> None:
    rollout = engine(False)
    for call in (rollout.prepare, lambda: rollout.build_topology(1, 1, []), rollout.init_process_group):
        with pytest.raises(RuntimeError, match=r"checkpoint_manager_class to weightsync\.\S+\.WeightsyncManager"):
            call()
    with pytest.raises(RuntimeError, match="checkpoint_manager_class"):
        asyncio.run(rollout.receive_weights(global_steps=1))


def manager(adapter: ModuleType, backend: str = "weightsync", modes: tuple[Mode, ...] = (), group: Any = None) -> Any:
    config = SimpleNamespace(backend=backend, custom_backend_module=MODULE)
    replicas = [SimpleNamespace(replica_rank=n, rollout_mode=mode) for n, mode in enumerate(modes)]
    return adapter.WeightsyncManager(config=config, actor_wg=group, replicas=replicas)


def test_the_manager_asks_the_actors_and_nobody_else(adapter: ModuleType) -> None:
    asked = []

    def update_weights(**how: object) -> list["Future[dict[str, float]]"]:
        asked.append(how)
        results: list[Future[dict[str, float]]] = [Future(), Future()]
        results[0].set_result({"weightsync/sequence": 5.0})
        results[1].set_result({})
        return results

    group = SimpleNamespace(update_weights=update_weights)
    whole = manager(adapter, modes=(Mode.STANDALONE,), group=group)
    assert whole.update_weights(7) == {"weightsync/sequence": 5.0}
    assert asked == [{"global_steps": 7, "mode": "weightsync"}]


def test_replicas_that_free_their_weights_are_refused_by_rank(adapter: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"replica 1 is hybrid: it shares its GPUs"):
        manager(adapter, modes=(Mode.STANDALONE, Mode.HYBRID))
    whole = manager(adapter)
    with pytest.raises(ValueError, match=r"replica 9 is colocated"):
        whole.add_replicas([SimpleNamespace(replica_rank=9, rollout_mode=Mode.COLOCATED)])
    assert whole.replicas == []
    whole.add_replicas([SimpleNamespace(replica_rank=9, rollout_mode=Mode.STANDALONE)])
    assert len(whole.replicas) == 1


def test_another_backend_is_refused_with_what_to_set(adapter: ModuleType) -> None:
    with pytest.raises(ValueError, match=rf"backend is 'nccl'; .*custom_backend_module={MODULE}"):
        manager(adapter, backend="nccl")
