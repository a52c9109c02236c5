"""What becomes of keys and values that the old weights computed, at a switch. Nothing is scheduled meanwhile."""

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

from weightsync.agents.inference.calls import Cache
from weightsync.agents.vllm.backend import logger


class CacheStuck(RuntimeError):
    """The cache cannot be emptied as things are. Nothing was changed in the weights; try again, or with ``keep``."""


def forget(core: Any, cache: Cache) -> None:
    """Make ``core`` forget what ``cache`` says.

    With ``drop``, embeddings of images that running requests still need cannot be told from those that a later request
    would find, so a server that holds some computes everything again.

    Raises:
        CacheStuck: vLLM cannot now (requests that wait for keys and values of another server).
    """
    if cache == "drop" and _embeddings(core):
        logger.info("weightsync: embeddings of the old weights are cached; running requests are computed again")
        cache = "recompute"
    try:
        if cache == "recompute":
            if not core.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
                raise CacheStuck("weightsync: cache=recompute: vLLM could not reset its prefix cache")
            core.reset_encoder_cache()
        elif cache == "drop":
            _drop(core.scheduler)
    except CacheStuck:
        raise
    except (RuntimeError, AttributeError) as error:
        raise CacheStuck(f"weightsync: cache={cache}: {error}") from error


def _drop(scheduler: Any) -> None:
    """Empty the prefix cache, and let nobody find what running requests put into it later: it is theirs alone.

    vLLM finds a block by a name that its tokens and its predecessor's name give. A running request's blocks get names
    that nobody can derive; those that follow take theirs from them.
    """
    manager = scheduler.kv_cache_manager
    with _as_if_unused(manager.block_pool):
        if not manager.reset_prefix_cache():
            raise CacheStuck("weightsync: cache=drop: vLLM could not reset its prefix cache")
    if getattr(scheduler, "connector", None) is not None and not scheduler.reset_connector_cache():
        raise CacheStuck("weightsync: cache=drop: the KV connector could not reset its cache")
    for request in scheduler.requests.values():
        if request.num_computed_tokens:
            request.block_hashes[:] = [secrets.token_bytes(len(name)) for name in request.block_hashes]


@contextlib.contextmanager
def _as_if_unused(pool: Any) -> Iterator[None]:
    """vLLM empties its prefix cache only while no block is in use; one in use does well without a name."""
    free = pool.num_gpu_blocks - 1  # the null block is always in use
    pool.get_num_free_blocks = lambda: free
    try:
        yield
    finally:
        del pool.get_num_free_blocks


def _embeddings(core: Any) -> bool:
    return bool(getattr(getattr(core.scheduler, "encoder_cache_manager", None), "cached", None))
