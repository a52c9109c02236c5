"""TRL: a ``WeightTransferProtocol`` for ``AsyncGRPOTrainer(weight_transfer=…)`` and ``AsyncDistillationTrainer``.

The protocol (TRL 1.16.0, ``trl/experimental/async_grpo/async_grpo_trainer.py``) is structural, so nothing of TRL is
imported. TRL calls it on the main process only, with full tensors; its other ranks drain the same generator.
"""

from collections.abc import Iterator, Mapping

import torch
from weightsync.agents.trainer.adapters.connection import PUBLISH_SECONDS, Connection, FilePath
from weightsync.agents.trainer.streams.stream_agent import StreamAgent


class WeightsyncTransfer:
    """Each ``send_weights`` is a version; it returns when the whole fleet serves it.

    Args:
        hub_url, token_file, run_id, run_dir, forward_dtype, model_config, publish_seconds: see ``Connection``.
        first_step: number of the first version. TRL passes none; with 1 the numbers are TRL's ``model_version``, and a
            resumed training goes on with ``first_step=model_version + 1``.

    Attributes:
        step: of the last version that was sent; ``first_step - 1`` before.
    """

    def __init__(
        self,
        *,
        hub_url: str,
        token_file: FilePath,
        run_id: str,
        run_dir: FilePath,
        forward_dtype: str | torch.dtype | None = None,
        model_config: FilePath | Mapping[str, object] | None = None,
        first_step: int = 1,
        publish_seconds: float = PUBLISH_SECONDS,
    ) -> None:
        self._connection = Connection(
            hub_url, token_file, run_id, run_dir, forward_dtype, model_config, publish_seconds
        )
        self._agent: StreamAgent | None = None
        self.step = first_step - 1

    def init_weight_transfer(self) -> None:
        """The daemon is met in the first ``send_weights``: only then is known what there is to send."""
        if self._agent is None:
            self._agent = self._connection.agent()

    def pause(self) -> None:
        """Nothing: the daemon pauses each engine for as long as it is written, and not while tensors are gathered."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Publish what passes as the next version.

        Raises:
            PublishError: it is not served. The number is used up; the next call sends the next one.
        """
        self.init_weight_transfer()
        assert self._agent is not None
        self.step += 1
        self._agent.publish_stream(self.step, iterator)

    def resume(self) -> None:
        """Nothing: engines go on by themselves when they hold the committed version."""

    def destroy(self) -> None:
        """Leave the fleet. Engines keep the last version, and one that starts later waits for the next trainer."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
