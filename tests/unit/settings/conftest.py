"""A configuration file that the tests of the settings write and load."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from settings_files import MINIMAL, Loaded, Refusal
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import Settings, load


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def loaded(config: Path) -> Loaded:
    def load_it(text: str = "", **environ: str) -> Settings:
        config.write_text(MINIMAL + text)
        return load(config, {f"WEIGHTSYNC__{key}": value for key, value in environ.items()})

    return load_it


@pytest.fixture
def refusal(config: Path) -> Refusal:
    def refuse(text: str, environ: Mapping[str, str] | None = None) -> ConfigError:
        config.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load(config, environ or {})
        return caught.value

    return refuse
