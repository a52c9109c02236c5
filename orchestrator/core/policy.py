"""The numbers that decisions depend on, in seconds unless the name says otherwise."""

import math
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Literal

from weightsync.orchestrator.protocol.messages import TransportSettings

AGENT_SHARE: Final = 0.9
"""Of the daemon's deadline, given to an agent for the same wait. The agent gives up first and says why; were the two
equal, the daemon would see only that nobody answered."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine of the configuration. How its ``servers`` are called is the daemon's affair."""

    name: str
    pair: str = ""
    servers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Admission:
    """Which engines may make themselves members. The patterns are a shell's; those of hosts in lower case."""

    names: tuple[str, ...]
    host_names: tuple[str, ...]
    networks: tuple[IPv4Network | IPv6Network, ...]
    at_most: int
    leave: float
    """Without a sign of life, until one of them is no member any more."""
    proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    """Before the daemon: whoever comes from there may be anybody."""


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Where vLLM's StatelessProcessGroup meets (``rendezvous: tcpstore``)."""

    host: str
    port: int
    timeout_seconds: float


FanOut = Literal["trainer", "peers", "auto"]
"""Who writes a committed version to an engine that catches up: trainer ranks, engines that serve it, or these first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Deadlines and bounds of the state machine. No field has a default: the settings are the one home of numbers."""

    run_id: str
    run_dir: str
    """Told to agents in Welcome."""
    engines: tuple[EngineConfig, ...]
    admission: Admission | None
    """None: the configuration alone says who is a member."""
    transport: TransportSettings
    group: GroupAddress | None
    trainer_world: int | None
    """Trainer ranks that must come; None: what the first one says."""
    min_engines: float
    """Engines that a commit needs: from 1 on so many, below it such a part of those that there are."""
    patience: float
    """Of an engine's serving time, what all others together may cost it in a round."""
    fan_out: FanOut
    together: bool
    """No engine serves a new version before all of the round can."""
    lease: float
    """From the daemon's last word until a paused engine with whole weights resumes by itself; 0: never."""
    retry: float
    """From the first attempt of a version until it is FAILED, if nobody is torn by it."""
    backoff: float
    """Before the second attempt; doubles with each further one. Likewise for an engine that was left out."""
    join: float
    """From the start until a plan or a version no longer waits for engines that have not come."""
    staged: float
    """From the first STAGED of a version until the last one and STABLE."""
    probe: float
    probe_interval: float
    """From the beginning of one look at an idle engine to the next."""
    attach: float
    pause: float
    quiesce: float
    transfer: float
    verify: float
    finish: float
    heartbeat: float
    lost_after: int
    """Heartbeats in a row, of either side, whose absence ends a connection; told to agents in Welcome."""

    @property
    def update(self) -> float:
        """Deadline of an engine's update call, which lasts from the pause of its scheduler to the decision.

        It is the sum of the phases within, and each of these has its own deadline, so that it never ends first.
        """
        return self.quiesce + self.transfer + self.verify + self.finish

    def quorum(self, engines: int) -> int:
        """How many of so many engines a commit needs; one at least."""
        part = self.min_engines < 1.0
        wanted = math.ceil(self.min_engines * engines) if part else int(self.min_engines)
        return max(1, min(wanted, engines))

    def agent_deadline(self, seconds: float) -> float:
        """The deadline that an agent is told where the daemon's own is ``seconds``."""
        return seconds * AGENT_SHARE
