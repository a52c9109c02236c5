"""Keys and values at a switch, on fakes of vLLM's scheduler; tests/e2e/test_shadow.py looks at real answers."""

from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.vllm import kv


class Pool:
    """vLLM's block pool: its cache is emptied only while no block is in use."""

    num_gpu_blocks = 10

    def __init__(self) -> None:
        self.cached = {b"a", b"b"}

    def get_num_free_blocks(self) -> int:
        return 4


class Manager:
    def __init__(self) -> None:
        self.block_pool = Pool()

    def reset_prefix_cache(self) -> bool:
        if self.block_pool.get_num_free_blocks() != self.block_pool.num_gpu_blocks - 1:
            return False
        self.block_pool.cached.clear()
        return True


def request(computed: int) -> Any:
    return SimpleNamespace(num_computed_tokens=computed, block_hashes=[b"first---", b"second--"])


class Core:
    def __init__(self) -> None:
        self.did: list[Any] = []
        self.answer = True
        self.scheduler = SimpleNamespace(
            kv_cache_manager=Manager(),
            requests={"running": request(20), "waiting": request(0)},
            encoder_cache_manager=SimpleNamespace(cached={}),
            connector=None,
            reset_connector_cache=lambda: self.did.append("connector") or self.answer,
        )

    def reset_prefix_cache(self, **options: bool) -> bool:
        self.did.append(options)
        return self.answer

    def reset_encoder_cache(self) -> None:
        self.did.append("encoder")


ALL = {"reset_running_requests": True, "reset_connector": True}


def test_keep_changes_nothing() -> None:
    core = Core()
    kv.forget(core, "keep")
    assert core.did == []
    assert core.scheduler.kv_cache_manager.block_pool.cached == {b"a", b"b"}


def test_recompute_preempts_whatever_runs() -> None:
    core = Core()
    kv.forget(core, "recompute")
    assert core.did == [ALL, "encoder"]


def test_drop_empties_the_cache_beside_running_requests_and_hides_what_they_put_there_later() -> None:
    core = Core()
    kv.forget(core, "drop")
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.cached == set()
    assert pool.get_num_free_blocks() == 4, "the pool counts as before"
    running, waiting = core.scheduler.requests["running"], core.scheduler.requests["waiting"]
    assert [len(name) for name in running.block_hashes] == [8, 8]
    assert not {b"first---", b"second--"} & set(running.block_hashes)
    assert waiting.block_hashes == [b"first---", b"second--"], "nothing of it was computed on the old weights"
    assert core.did == []


def test_drop_tells_the_connector() -> None:
    core = Core()
    core.scheduler.connector = object()
    kv.forget(core, "drop")
    assert core.did == ["connector"]
    core.answer = False
    with pytest.raises(kv.CacheStuck, match="cache=drop: the KV connector"):
        kv.forget(core, "drop")


def test_drop_with_embeddings_of_images_is_recompute() -> None:
    core = Core()
    core.scheduler.encoder_cache_manager.cached["image"] = {"running"}
    kv.forget(core, "drop")
    assert core.did == [ALL, "encoder"]


def test_a_cache_that_vllm_cannot_reset_is_an_error() -> None:
    core = Core()
    core.answer = False
    with pytest.raises(kv.CacheStuck, match="cache=recompute: vLLM could not"):
        kv.forget(core, "recompute")
    core.reset_prefix_cache = lambda **options: (_ for _ in ()).throw(RuntimeError("remote KV"))  # type: ignore[method-assign]
    with pytest.raises(kv.CacheStuck, match="cache=recompute: remote KV"):
        kv.forget(core, "recompute")
    core.scheduler.kv_cache_manager.reset_prefix_cache = lambda: False
    with pytest.raises(kv.CacheStuck, match="cache=drop: vLLM could not"):
        kv.forget(core, "drop")
