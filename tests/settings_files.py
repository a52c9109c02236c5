"""A configuration of few lines, and how the tests of the settings load it."""

from collections.abc import Mapping
from typing import Protocol

from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import Settings

MINIMAL = """\
run:
  id: glm
  directory: runs/glm
state_directory: state
listen: {port: 7410}
credentials: credentials
engines:
  - name: a
    url: http://127.0.0.1:8000
"""


class Loaded(Protocol):
    """Loads MINIMAL with ``text`` below it; the keywords are variables without their prefix."""

    def __call__(self, text: str = "", **environ: str) -> Settings: ...


class Refusal(Protocol):
    """What loading ``text`` raises."""

    def __call__(self, text: str, environ: Mapping[str, str] | None = None) -> ConfigError: ...
