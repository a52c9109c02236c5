"""The sections of the settings: every key with its type, unit, limit and default."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from weightsync.orchestrator.core.policy import GroupAddress
from weightsync.orchestrator.protocol.limits import MAX_NET_DEVICES, MAX_SERVERS, MAX_URL_CHARS
from weightsync.orchestrator.protocol.messages import FilesystemSettings, NixlSettings
from weightsync.orchestrator.protocol.names import IDENTIFIER
from weightsync.orchestrator.settings.places import (
    URL_PATTERN,
    usable_host,
    usable_host_pattern,
    usable_network,
    usable_path,
    usable_url,
)
from weightsync.orchestrator.settings.sources import NUMBERED

NetDevice = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]{1,64}(:[0-9]{1,3})?$")]
Identifier = Annotated[str, Field(pattern=rf"^{IDENTIFIER}$")]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]

Host = Annotated[str, Field(pattern=r"^[^\s/?#@]{1,253}$"), AfterValidator(usable_host)]
Url = Annotated[str, Field(pattern=f"^{URL_PATTERN}$", max_length=MAX_URL_CHARS), AfterValidator(usable_url)]
File = Annotated[Path, AfterValidator(usable_path)]


MAX_ENGINES: Final = 4096
"""Engines of one run; the hub was measured to 4096 agents."""

MAX_PATTERNS: Final = 256
"""Of names or hosts of engines; each is compared when an engine comes."""

_NIXL: Final = NixlSettings()


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """Which training job, and where its run directory is."""

    id: Identifier = Field(description="Name of the training job; agents of another run are refused.")
    directory: File = Field(description="The run directory, shared with the trainer; holds broadcasts/step_<N>/.")


class ListenTls(Section):
    """TLS of the daemon's listener."""

    certificate_file: File = Field(
        description="PEM file with the daemon's certificate, for the names it is reached by."
    )
    key_file: File = Field(description="PEM file with its key, without a password.")
    ca_file: File = Field(description="PEM file of the authority that signed it, and the certificates of clients.")
    client_certificates: bool = Field(
        default=False,
        description="Whether agents and all who ask must show a certificate of that authority, which names their role.",
    )


class EnginesTls(Section):
    """How the daemon asks engines whose URL is https."""

    ca_file: File | None = Field(
        default=None, description="PEM file of the authority of their certificates; null: the system's authorities."
    )
    certificate_file: File | None = Field(
        default=None, description="PEM file with the certificate that we show, if any."
    )
    key_file: File | None = Field(default=None, description="PEM file with its key; null: in certificate_file.")


class ListenSection(Section):
    """Where agents and the command line reach the daemon."""

    host: Host = Field(default="127.0.0.1", description="Address to bind.")
    port: int = Field(default=7410, ge=1, le=65535, description="TCP port to bind.")
    tls: ListenTls | None = Field(default=None, description="Certificate and key of the daemon; null: no TLS.")
    insecure: bool = Field(
        default=False,
        description="Whether it may listen beyond this machine without TLS, on a network of friends only.",
    )


class EngineSection(Section):
    """One inference engine's server."""

    name: Identifier = Field(description="Name of the engine, unique in the run; also the name its agents report.")
    kind: Identifier = Field(default="vllm", description="Kind of engine; config check names those there are.")
    url: Url = Field(description="Base URL of its API server, such as http://host:8000.")
    more_urls: tuple[Url, ...] = Field(
        default=(),
        max_length=MAX_SERVERS - 1,
        description="Further API servers of the same engine (external or hybrid data-parallel load balancing).",
    )
    role: Literal["prefill", "decode", "both"] = Field(
        default="both", description="What it does in a disaggregated pair."
    )
    pair: Identifier | None = Field(
        default=None, description="Prefill and decode engines of one pair are left out of a round together."
    )
    api_key_file: File | None = Field(default=None, description="File with the key that its API asks for, if it does.")

    @property
    def servers(self) -> tuple[str, ...]:
        """The URLs of all its API servers."""
        return (self.url, *self.more_urls)


class EngineList(Section):
    """A file of ``engines_from``."""

    engines: tuple[EngineSection, ...] = Field(max_length=MAX_ENGINES, description="Engines, as in the configuration.")


NamePattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9._*?\[\]!-]{1,128}$")]
HostPattern = Annotated[str, Field(min_length=1, max_length=253), AfterValidator(usable_host_pattern)]
Network = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(usable_network)]


class EnginesAdmitSection(Section):
    """Engines that may make themselves members: they know the token, and come by a name and from a host as here."""

    names: Annotated[tuple[NamePattern, ...], NUMBERED] = Field(
        min_length=1, max_length=MAX_PATTERNS, description="Patterns of their names, as a shell's: decode-*."
    )
    hosts: Annotated[tuple[HostPattern, ...], NUMBERED] = Field(
        min_length=1,
        max_length=MAX_PATTERNS,
        description="Networks (10.1.0.0/16) and patterns of host names (*.gpu.example) that their URLs may name.",
    )
    at_most: int = Field(default=64, ge=1, le=MAX_ENGINES, description="So many of them at once.")
    leave_seconds: float = Field(
        default=60,
        ge=5,
        le=86400,
        description="One that is neither heard nor connected for so long is no member until it is heard again.",
    )
    api_key_file: File | None = Field(
        default=None, description="File with the key that their API asks for, if it does."
    )
    proxies: Annotated[tuple[Network, ...], NUMBERED] = Field(
        default=(),
        max_length=MAX_PATTERNS,
        description="Networks of proxies before the daemon, behind which an engine's own address is not seen.",
    )


class TrainerSection(Section):
    """The trainer fleet."""

    world: int | None = Field(
        default=None, ge=1, le=65536, description="Trainer ranks; null takes it from the first Hello."
    )


class NixlSection(Section):
    """NIXL writes into registered memory. The defaults are those of the message that agents get."""

    type: Literal["nixl"] = "nixl"
    backends: Annotated[tuple[Identifier, ...], NUMBERED] = Field(
        default=_NIXL.backends, min_length=1, max_length=8, description="NIXL backends."
    )
    in_flight_per_peer: int = Field(
        default=_NIXL.in_flight_per_peer,
        ge=1,
        le=10_000,
        description="Handles in flight per peer: a sliding window; nothing is drained.",
    )
    rails: int = Field(default=_NIXL.rails, ge=1, le=16, description="NIC ports that one rank may use at once.")
    max_gb_per_second: float | None = Field(
        default=_NIXL.max_gb_per_second,
        gt=0,
        description="Gigabytes (10^9 bytes) per second that no link to one peer exceeds: a write that reports more has"
        " moved nothing and fails. null: not judged.",
    )

    stall_seconds: Seconds = Field(
        default=_NIXL.stall_seconds,
        description="How long nothing of a write to one peer may end although something is on its way; its path then"
        " counts as gone (a network interface was removed, say), and the next attempt takes another connection.",
    )
    net_devices: Annotated[tuple[NetDevice, ...], NUMBERED] = Field(
        default=_NIXL.net_devices,
        max_length=MAX_NET_DEVICES,
        description="Network devices that UCX may use in every agent, as it names them: an interface (eth1) or a port"
        " of an RDMA device (mlx5_0:1). A host that lacks one says so. Of several ports, a GPU takes the nearest."
        " Empty: UCX's own choice (UCX_NET_DEVICES of the agent's environment), and for a GPU its nearest ports.",
    )

    def message(self, run_directory: Path) -> NixlSettings:
        """What agents are told."""
        return NixlSettings(
            backends=self.backends,
            in_flight_per_peer=self.in_flight_per_peer,
            rails=self.rails,
            max_gb_per_second=self.max_gb_per_second,
            stall_seconds=self.stall_seconds,
            net_devices=self.net_devices,
        )


class FilesystemSection(Section):
    """The engine reloads a checkpoint from broadcasts/step_<N>/."""

    type: Literal["filesystem"] = "filesystem"

    def message(self, run_directory: Path) -> FilesystemSettings:
        """What agents are told."""
        return FilesystemSettings(str(run_directory))


class HubSection(Section):
    """Both rounds of the rendezvous over the agents' control connections."""

    type: Literal["hub"] = "hub"

    def group_address(self) -> None:
        """Where the process group meets: there is none."""


class TcpStoreSection(Section):
    """Both rounds over vLLM's StatelessProcessGroup; it pickles, so only on a trusted network."""

    type: Literal["tcpstore"] = "tcpstore"
    host: Host = Field(description="Address of the store that every agent can reach.")
    port: int = Field(default=29501, ge=1, le=65535, description="TCP port of the store.")
    timeout_seconds: Seconds = Field(default=1200, description="Seconds until an exchange over the store is given up.")

    def group_address(self) -> GroupAddress:
        """Where the process group meets."""
        return GroupAddress(host=self.host, port=self.port, timeout_seconds=self.timeout_seconds)


class PauseSection(Section):
    """What a round does with an engine's requests, and with what they have computed."""

    mode: Literal["keep", "wait", "abort"] = Field(default="keep", description="What happens to requests in flight.")
    cache: Literal["keep", "drop", "recompute"] = Field(
        default="recompute",
        description="What old weights computed: keep it, drop the prefix cache, or recompute kept requests, too.",
    )


class CommitSection(Section):
    """On whom a commit depends."""

    min_engines: float = Field(
        default=0.5,
        gt=0,
        le=65536,
        description="Engines that a commit needs: below 1 a part of all, from 1 on a whole number; more means all.",
    )
    patience_seconds: Seconds = Field(
        default=30, description="What engines that are ready wait in a round, in all, for those that are not."
    )
    together: bool = Field(default=False, description="No engine serves a version before all of its round can.")
    lease_seconds: float = Field(
        default=120,
        ge=0,
        le=86400,
        description="An engine paused with whole weights resumes by itself without a daemon for so long; 0: never.",
    )

    @field_validator("min_engines")
    @classmethod
    def _whole(cls, wanted: float) -> float:
        if wanted >= 1 and wanted != int(wanted):
            raise ValueError("from 1 on it is a whole number of engines")
        return wanted


class DeadlinesSection(Section):
    """Total deadlines in seconds, the daemon's own; agents get shorter ones."""

    join_seconds: Seconds = Field(default=600, description="A published version waits so long for enough engines.")
    staged_seconds: Seconds = Field(default=300, description="STABLE without STAGED of every rank, or the reverse.")
    pause_seconds: Seconds = Field(default=120, description="Pausing one engine (mode wait drains its requests).")
    quiesce_seconds: Seconds = Field(default=60, description="From the update call until every worker stands still.")
    transfer_seconds: Seconds = Field(default=300, description="From the grant until every writer has closed.")
    verify_seconds: Seconds = Field(default=120, description="From the last closed writer until every digest is there.")
    finish_seconds: Seconds = Field(default=60, description="From the decision until every worker has left the update.")
    probe_seconds: Seconds = Field(default=10, description="Asking one engine for its routes and its state.")
    probe_interval_seconds: Seconds = Field(default=5, description="Between two looks at an engine outside a round.")
    attach_seconds: Seconds = Field(
        default=20, description="Starting the agents of one engine: threads and a NIXL agent in every worker."
    )
    stop_seconds: Seconds = Field(
        default=30, description="From SIGTERM until a round under way is left to the next start."
    )
    heartbeat_seconds: Seconds = Field(default=5, description="Between two signs of life on a control connection.")
    lost_after_heartbeats: int = Field(
        default=3, ge=1, le=100, description="Signs of life missed until an agent is lost."
    )


class RetrySection(Section):
    """A failed round."""

    give_up_seconds: Seconds = Field(
        default=300,
        description="From a version's first attempt until FAILED; an engine that it tore is repaired first.",
    )
    backoff_seconds: Seconds = Field(
        default=1.0, description="Before the second attempt; doubles with each further one. For each engine, too."
    )


class LogSection(Section):
    """The daemon's own log, on standard error."""

    format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: console on a terminal, else JSON."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level to print."
    )


class TracesSection(Section):
    """One trace of each version, from its publish to each engine's switch."""

    otlp_endpoint: Url | None = Field(
        default=None, description="Where spans are posted (OTLP over HTTP), such as http://host:4318/v1/traces."
    )


def _typed_as(default: str) -> BeforeValidator:
    """Lets a section without ``type`` mean ``default``, so that one key can be overridden without repeating it."""

    def fill(value: object) -> object:
        return {"type": default, **value} if isinstance(value, dict) and "type" not in value else value

    return BeforeValidator(fill)


Transport = Annotated[NixlSection | FilesystemSection, Field(discriminator="type"), _typed_as("nixl")]
Rendezvous = Annotated[HubSection | TcpStoreSection, Field(discriminator="type"), _typed_as("hub")]
