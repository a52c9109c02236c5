"""The daemon's settings: one YAML file, every value overridable by ``WEIGHTSYNC__…`` in the environment.

Unknown keys are refused, secrets come only from files, relative paths count from the file's own directory.
``example.yaml`` beside this explains every key; ``weightsync-orchestrator config schema`` prints the JSON schema.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from weightsync.orchestrator.core.policy import FanOut
from weightsync.orchestrator.settings.anchors import anchored
from weightsync.orchestrator.settings.document import Document
from weightsync.orchestrator.settings.engine_lists import require_different, with_lists
from weightsync.orchestrator.settings.explain import explain
from weightsync.orchestrator.settings.places import is_loopback, usable_path
from weightsync.orchestrator.settings.problems import ConfigError, Problem
from weightsync.orchestrator.settings.sections import (
    MAX_ENGINES,
    CommitSection,
    DeadlinesSection,
    EnginesAdmitSection,
    EngineSection,
    EnginesTls,
    File,
    HubSection,
    ListenSection,
    LogSection,
    NixlSection,
    PauseSection,
    Rendezvous,
    RetrySection,
    RunSection,
    Seconds,
    TracesSection,
    TrainerSection,
    Transport,
    Url,
)
from weightsync.orchestrator.settings.sources import NUMBERED, EnvironmentSource, FileSource


class Settings(BaseSettings):
    """Everything that the daemon is told. Made by ``load``."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, title="weightsync-orchestrator")

    run: RunSection
    state_directory: File = Field(description="Local directory of the journal; never on a network file system.")
    listen: ListenSection = ListenSection()
    credentials: File = Field(
        description="Directory of the token files, one for each role: trainer.token, engine.token, viewer.token,"
        " operator.token (weightsync-orchestrator tokens DIR makes them)."
    )
    advertise_url: Url | None = Field(
        default=None, description="URL by which agents reach the daemon; null: from listen."
    )
    engines: Annotated[tuple[EngineSection, ...], NUMBERED] = Field(
        default=(), max_length=MAX_ENGINES, description="The vLLM servers."
    )
    engines_tls: EnginesTls = EnginesTls()
    engines_from: File | None = Field(
        default=None, description="File, or directory of files, with further engines; read again when it changes."
    )
    engines_admit: EnginesAdmitSection | None = Field(
        default=None, description="Engines that make themselves members; null: only those that are listed are any."
    )
    trainer: TrainerSection = TrainerSection()
    transport: Transport = Field(default=NixlSection(), description="How weights travel.")
    rendezvous: Rendezvous = Field(default=HubSection(), description="How agents learn of each other.")
    pause: PauseSection = PauseSection()
    fan_out: FanOut = Field(
        default="trainer",
        description="Who writes to an engine that catches up: trainer, peers (engines that serve the version), or auto:"
        " peers, and the trainer where none can. With peers what is published leaves the trainer once, too: one of the"
        " engines that hold the same writes it to the others.",
    )
    commit: CommitSection = CommitSection()
    deadlines: DeadlinesSection = DeadlinesSection()
    retry: RetrySection = RetrySection()
    rescan_seconds: Seconds = Field(
        default=5.0, description="Between two scans of the run directory without any event."
    )
    log: LogSection = LogSection()
    traces: TracesSection = TracesSection()

    @field_validator("engines")
    @classmethod
    def _engines_differ(cls, engines: tuple[EngineSection, ...]) -> tuple[EngineSection, ...]:
        require_different(engines)
        return engines

    @model_validator(mode="after")
    def _some_engine(self) -> "Settings":
        if not self.engines and self.engines_from is None and self.engines_admit is None:
            raise ValueError(
                "there is no engine: list some in engines, name a file in engines_from, or let them come by themselves "
                "with engines_admit"
            )
        return self

    @model_validator(mode="after")
    def _agents_can_reach_us(self) -> "Settings":
        if self.advertise_url is None and self.listen.host in ("0.0.0.0", "::", "*"):
            raise ValueError(
                "listen.host is a wildcard, so advertise_url must say by which URL agents reach the daemon"
            )
        return self

    @model_validator(mode="after")
    def _nobody_listens_in(self) -> "Settings":
        listen, scheme = self.listen, "https" if self.listen.tls else "http"
        if listen.tls is None and not listen.insecure and not is_loopback(listen.host):
            raise ValueError(
                f"listen.host is {listen.host}, beyond this machine, and there is no TLS: give listen.tls"
                " (weightsync-orchestrator certs makes what it needs), or say listen.insecure: true where nobody else"
                " can reach that network"
            )
        if self.advertise_url is not None and not self.advertise_url.startswith(f"{scheme}://"):
            raise ValueError(
                f"advertise_url is {self.advertise_url}, and the daemon speaks {scheme} (listen.tls): TLS has to end at"
                " the daemon, whose certificate the agents' proofs cover"
            )
        return self

    @model_validator(mode="after")
    def _peers_can_write(self) -> "Settings":
        if self.fan_out == "trainer":
            return self
        for key, kind, wanted in (
            ("transport.type", self.transport.type, "nixl"),
            ("rendezvous.type", self.rendezvous.type, "hub"),
        ):
            if kind != wanted:
                raise ValueError(
                    f"fan_out is {self.fan_out}, and with {key}: {kind} engines cannot write to each other: say"
                    f" fan_out: trainer, or {key}: {wanted}"
                )
        return self

    @property
    def agents_url(self) -> str:
        """The URL that agents use: ``advertise_url``, else the listening address."""
        if self.advertise_url is not None:
            return self.advertise_url.rstrip("/")
        host = f"[{self.listen.host}]" if ":" in self.listen.host else self.listen.host
        return f"{'http' if self.listen.tls is None else 'https'}://{host}:{self.listen.port}"

    @property
    def journal_path(self) -> Path:
        """The journal's SQLite file."""
        return self.state_directory / "journal.sqlite"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment above the file. ``load`` passes both as the only arguments of the constructor."""
        assert isinstance(init_settings, InitSettingsSource)
        return tuple(init_settings.init_kwargs["sources"])


def load(path: Path | str, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in ``path`` with the overrides in ``environ`` (default: the process's), paths made absolute.

    Raises:
        ConfigError: naming file, line and key (or variable), value and fix of everything that is wrong.
    """
    try:
        # What relative paths count from goes to agents and into logs.
        file = usable_path(usable_path(Path(path)).absolute())
    except ValueError as error:
        raise ConfigError(Path(path), Problem("", "", str(error), "name the file otherwise")) from error
    document = Document.read(file)
    environment = EnvironmentSource(Settings, document, os.environ if environ is None else environ)
    # Not by keyword: type checkers would look for a key of that name.
    arguments: dict[str, Any] = {"sources": (environment, FileSource(Settings, document, environment))}
    try:
        settings = Settings(**arguments)
    except ValidationError as error:
        raise ConfigError(file, *explain(document, environment.variables, error, Settings)) from error
    settings = anchored(settings, file.parent)
    if settings.engines_from is None:
        return settings
    return settings.model_copy(update={"engines": with_lists(file, settings.engines, settings.engines_from)})
