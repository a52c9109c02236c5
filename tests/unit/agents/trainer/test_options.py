"""Where a trainer's settings come from: an argument before a variable before the file, and what is missing is named."""

from pathlib import Path

import pytest
import yaml
from weightsync.agents.trainer.options import TrainerSettings, TrainerSettingsError, trainer_settings

FLAT = {"hub_url": "ws://file/agents", "token_file": "secret/token", "run_id": "of-file", "run_dir": "/runs/file"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_argument_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "weightsync.yaml").write_text(yaml.safe_dump(FLAT))
    environment = {"WEIGHTSYNC_HUB_URL": "ws://variable/agents", "WEIGHTSYNC_RUN_ID": "of-variable"}
    found = trainer_settings(hub_url="ws://argument/agents", environment=environment)
    assert found == TrainerSettings("ws://argument/agents", Path("secret/token"), "of-variable", Path("/runs/file"))


def test_paths_may_be_text_or_paths(tmp_path: Path) -> None:
    as_text = trainer_settings("ws://a/agents", "t", "r", str(tmp_path), environment={})
    assert as_text == trainer_settings("ws://a/agents", Path("t"), "r", tmp_path, environment={})
    assert (as_text.token_file, as_text.run_dir) == (Path("t"), tmp_path)


def test_relative_paths_of_a_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    file = tmp_path / "conf" / "w.yaml"
    file.write_text(yaml.safe_dump(FLAT))
    found = trainer_settings(environment={"WEIGHTSYNC_CONFIG": str(file)})
    assert (found.token_file, found.run_dir) == (tmp_path / "conf" / "secret" / "token", Path("/runs/file"))


def test_the_daemons_own_configuration_serves_too(tmp_path: Path) -> None:
    file = tmp_path / "prod.yaml"
    document = {
        "run": {"id": "glm", "directory": "/runs/glm"},
        "credentials": "secret",
        "engines": [],
    }
    file.write_text(yaml.safe_dump(document))
    environment = {"WEIGHTSYNC_CONFIG": str(file), "WEIGHTSYNC_HUB_URL": "ws://d/agents"}
    assert trainer_settings(environment=environment) == TrainerSettings(
        "ws://d/agents", tmp_path / "secret" / "trainer.token", "glm", Path("/runs/glm")
    )


def test_what_is_missing_is_named_with_all_three_places() -> None:
    with pytest.raises(TrainerSettingsError) as error:
        trainer_settings(run_id="r", run_dir="d", environment={"WEIGHTSYNC_TOKEN_FILE": ""})
    for word in (
        "hub_url=",
        "WEIGHTSYNC_HUB_URL",
        "token_file=",
        "WEIGHTSYNC_TOKEN_FILE",
        "key hub_url in",
        "./weightsync.yaml",
    ):
        assert word in str(error.value)
    assert "run_id" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hub_ulr: ws://x/agents", "unknown key 'hub_ulr'; there are hub_url, token_file"),
        ("run_id: 7", "run_id (weightsync.yaml) must be text, got int 7"),
        ("- a", "must hold the keys hub_url"),
        ("{", "is no YAML"),
        ("run_id: !!timestamp x", "is no YAML"),
        ("run_id: !!bool x", "is no YAML"),
        ("run_id: !!int ''", "is no YAML"),
    ],
)
def test_a_file_that_cannot_serve_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "weightsync.yaml").write_text(text)
    with pytest.raises(TrainerSettingsError) as error:
        trainer_settings(environment={})
    assert words in str(error.value)


def test_a_file_that_is_named_must_be_there_and_one_that_is_not_needed_is_not_read(tmp_path: Path) -> None:
    environment = {"WEIGHTSYNC_CONFIG": "nowhere.yaml"}
    with pytest.raises(TrainerSettingsError, match=r"nowhere\.yaml cannot be read: No such file"):
        trainer_settings(environment=environment)
    assert trainer_settings("ws://a/agents", "t", "r", "d", environment=environment).run_id == "r"


@pytest.mark.parametrize("given", [{"run_id": 7}, {"token_file": b"t"}, {"run_dir": 3}])
def test_an_argument_of_a_wrong_type_is_named(given: dict[str, object]) -> None:
    arguments = {"hub_url": "ws://a/agents", "token_file": "t", "run_id": "r", "run_dir": "d", **given}
    with pytest.raises(TrainerSettingsError, match=next(iter(given))):
        trainer_settings(**arguments, environment={})  # type: ignore[arg-type]
