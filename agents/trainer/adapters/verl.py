"""verl: a checkpoint engine and a manager, for verl's two plug-in seams.

* ``actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module`` is this module: verl imports it in every
  worker, and it registers the backend "weightsync" (verl 0.9.1, ``verl/checkpoint_engine/base.py``).
* ``actor_rollout_ref.rollout.checkpoint_manager_class`` is ``WeightsyncManager`` in it: it asks the actors for a
  version and leaves the rollout's servers alone, because the daemon pauses and resumes them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineManager, CheckpointEngineRegistry
from verl.utils.ray_utils import auto_await
from weightsync.agents.trainer.adapters.connection import PUBLISH_SECONDS, Connection, FilePath
from weightsync.agents.trainer.streams.stream import drain
from weightsync.agents.trainer.streams.stream_agent import StreamAgent

BACKEND: Final = "weightsync"


@CheckpointEngineRegistry.register(BACKEND)
class WeightsyncCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """In an actor: publishes what passes. In a rollout worker: nothing, the daemon's agent lives in vLLM itself.

    Args:
        bucket_size: of verl's buckets; tensors are converted one by one, and it is not used.
        is_master: whether this is the actor's rank 0. It alone publishes; the others take part in the gathering.
        The others come from ``engine_kwargs.weightsync``; see ``Connection``.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        *,
        hub_url: str,
        token_file: FilePath,
        run_id: str,
        run_dir: FilePath,
        forward_dtype: str | torch.dtype | None = None,
        model_config: FilePath | Mapping[str, object] | None = None,
        publish_seconds: float = PUBLISH_SECONDS,
    ) -> None:
        self._connection = Connection(
            hub_url, token_file, run_id, run_dir, forward_dtype, model_config, publish_seconds
        )
        self._is_master = is_master
        self._agent: StreamAgent | None = None
        self._step = -1

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Publish ``weights`` as version ``global_steps`` (None: the one after the last), on every rank of the actor.

        Blocks the actor's event loop: gathering is a collective, which belongs to this thread.

        Returns:
            On the master the commit's number for verl's log; elsewhere nothing.

        Raises:
            PublishError: the version is not served.
        """
        if not self._is_master:
            drain(weights)
            return {}
        if self._agent is None:
            try:
                self._agent = self._connection.agent()
            except Exception:
                drain(weights)
                raise
        self._step = self._step + 1 if global_steps is None else global_steps
        return {"weightsync/sequence": float(self._agent.publish_stream(self._step, weights))}

    async def receive_weights(self, global_steps: int | None = None) -> NoReturn:
        """Never: weights arrive beside verl.

        Raises:
            RuntimeError: verl's stock manager drives the round.
        """
        raise RuntimeError(_STOCK_MANAGER)

    def prepare(self) -> NoReturn:
        """Never; as ``receive_weights``."""
        raise RuntimeError(_STOCK_MANAGER)

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> NoReturn:
        """Never; as ``receive_weights``."""
        raise RuntimeError(_STOCK_MANAGER)

    def init_process_group(self, **kwargs: Any) -> NoReturn:
        """Never; as ``receive_weights``."""
        raise RuntimeError(_STOCK_MANAGER)

    def finalize(self) -> None:
        """Leave the fleet; verl's stock rounds call it after each version, ``WeightsyncManager`` never."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None


class WeightsyncManager(CheckpointEngineManager):  # type: ignore[misc]
    """Coordinates nothing but the actors; which engines there are is the daemon's configuration.

    Raises:
        ValueError: another backend is configured, or a replica shares its GPU with the trainer.
    """

    def __init__(self, config: Any, actor_wg: Any, replicas: Sequence[Any]) -> None:
        if config.backend != BACKEND:
            raise ValueError(
                f"checkpoint_engine.backend is {config.backend!r}; WeightsyncManager needs {BACKEND!r}, and with it"
                f" custom_backend_module={__name__}"
            )
        _check_standalone(replicas)
        super().__init__(config, actor_wg, replicas)

    def add_replicas(self, replicas: Sequence[Any]) -> None:
        """As verl's; each is to be an engine of the daemon."""
        _check_standalone(replicas)
        super().add_replicas(replicas)

    @auto_await  # type: ignore[untyped-decorator]
    async def update_weights(self, global_steps: int | None = None) -> dict[str, float]:
        """Have the actors publish, and return when the whole fleet serves the version.

        Requests in flight go on; nothing is aborted, no process group is built.
        """
        results = ray.get(self.actor_wg.update_weights(global_steps=global_steps, mode=self.backend))
        return dict(_pairs(results))


def _check_standalone(replicas: Iterable[Any]) -> None:
    """Hybrid and colocated replicas free their weights while the trainer runs; nothing can be written into those."""
    for replica in replicas:
        mode = getattr(replica.rollout_mode, "value", replica.rollout_mode)
        if mode != "standalone":
            raise ValueError(
                f"rollout replica {replica.replica_rank} is {mode}: it shares its GPUs with the trainer and frees its"
                " weights between steps; weightsync needs standalone replicas (verl.experimental.separation and the"
                " asynchronous trainers have them)"
            )


def _pairs(results: Iterable[Any]) -> Iterator[tuple[str, float]]:
    for result in results:
        if isinstance(result, dict):
            yield from result.items()


_STOCK_MANAGER: Final = (
    "the backend weightsync needs its own manager: set actor_rollout_ref.rollout.checkpoint_manager_class to"
    f" {__name__}.WeightsyncManager"
)
