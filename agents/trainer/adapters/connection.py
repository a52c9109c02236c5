"""What every adapter asks its user for, and the agent that comes of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.replicas import ALONE, Group
from weightsync.agents.trainer.streams.stream_agent import StreamAgent

FilePath = str | os.PathLike[str]

PUBLISH_SECONDS = 1800.0
"""As long as TRL and verl wait for a weight update of theirs."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the daemon is and how tensors travel.

    Args:
        hub_url: ``ws://host:port/agents`` of the daemon.
        token_file: file with the bearer token.
        run_id, run_dir: of the run, as in the daemon's configuration.
        forward_dtype: what tensors are rounded to before anything else ("bfloat16", or a torch.dtype). None: they are
            cast straight to what the engines need.
        model_config: config.json of the model (its path, its folder, or its values), which then says in place of the
            engines how tensors are cast and quantised; ``rendezvous: tcpstore`` needs it. None: the engines do.
        publish_seconds: for one version to be committed.

    Raises:
        ValueError: an empty field, or no dtype of floating point.
    """

    hub_url: str
    token_file: FilePath
    run_id: str
    run_dir: FilePath
    forward_dtype: str | torch.dtype | None = None
    model_config: FilePath | Mapping[str, object] | None = None
    publish_seconds: float = PUBLISH_SECONDS

    def __post_init__(self) -> None:
        for name in ("hub_url", "token_file", "run_id", "run_dir"):
            if not getattr(self, name):
                raise ValueError(f"weightsync: {name} is empty; it is the daemon's (see docs/adapters)")
        self.dtype()

    def dtype(self) -> torch.dtype | None:
        """``forward_dtype`` as torch has it."""
        given = self.forward_dtype
        found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
        if given is None or (isinstance(found, torch.dtype) and found.is_floating_point):
            return found
        raise ValueError(f"weightsync: forward_dtype {given!r} is no dtype of floating point such as 'bfloat16'")

    def agent(self, group: Group = ALONE) -> StreamAgent:
        """An agent for streams: alone, or one for each rank of ``group``, made on all of them."""
        dtype, table = self.dtype(), None
        if self.model_config is not None:
            config = self.model_config if isinstance(self.model_config, Mapping) else Path(self.model_config)
            table = model_table(config, forward_dtype=dtype or torch.bfloat16)
        return StreamAgent(
            table,
            hub_url=self.hub_url,
            token_file=self.token_file,
            run_id=self.run_id,
            run_dir=self.run_dir,
            process_group=group,
            publish_seconds=self.publish_seconds,
            forward_dtype=dtype,
        )
