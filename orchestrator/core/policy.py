"""The numbers that decisions depend on, in seconds unless the name says otherwise."""

from dataclasses import dataclass

from weightsync.orchestrator.protocol.messages import FilesystemSettings, NixlSettings


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine of the configuration. The core knows its name and its pair; how to reach it is the daemon's affair."""

    name: str
    pair: str = ""


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Where vLLM's StatelessProcessGroup meets (``rendezvous: tcpstore``)."""

    host: str
    port: int
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Policy:
    """Deadlines and bounds of the state machine; the daemon fills it from the settings."""

    run_id: str
    engines: tuple[EngineConfig, ...]
    transport: NixlSettings | FilesystemSettings
    group: GroupAddress | None = None
    run_dir: str = ""
    trainer_world: int | None = None
    attempts: int = 3
    backoff: float = 1.0
    join: float = 1800.0
    staged: float = 120.0
    rendezvous: float = 120.0
    probe: float = 5.0
    pause: float = 30.0
    quiesce: float = 60.0
    transfer: float = 120.0
    verify: float = 120.0
    finish: float = 60.0
    heartbeat: float = 5.0
    max_bytes_per_second: float | None = None

    @property
    def window(self) -> float:
        """How long one update call may last: everything between pause and resume, and a margin for the answers.

        Agents leave the window by themselves before the daemon's own deadline for the call ends.
        """
        return self.quiesce + self.transfer + self.verify + self.finish
