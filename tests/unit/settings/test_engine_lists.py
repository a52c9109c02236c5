"""Engines in files of their own: which files count, what is refused, and what tells that one has changed."""

import os
from pathlib import Path

import pytest
from settings_files import MINIMAL
from weightsync.orchestrator.settings.engine_lists import files_of, look
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import Settings, load


def listed(name: str, port: int, more: str = "") -> str:
    return f'engines: [{{name: {name}, url: "http://h:{port}"{more}}}]\n'


def loaded(config: Path, source: Path) -> Settings:
    config.write_text(f"{MINIMAL}\nengines_from: {source}\n")
    return load(config, {})


def names(settings: Settings) -> list[str]:
    return [engine.name for engine in settings.engines]


def test_a_file_and_a_directory(config: Path, tmp_path: Path) -> None:
    own = names(load(config, {}))
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "z.yaml").write_text(listed("z", 1, ", api_key_file: key"))
    (lists / "y.json").write_text('{"engines": [{"name": "y", "url": "http://h:2"}]}')
    (lists / ".c.yaml").write_text("half written")
    (lists / "notes.txt").write_text("none of ours")
    settings = loaded(config, Path("lists"))
    assert names(settings) == [*own, "y", "z"]
    assert settings.engines[-1].api_key_file == lists / "key", "it counts from its own file's directory"
    assert names(loaded(config, lists / "z.yaml")) == [*own, "z"]


def test_there_may_be_no_engine_yet(config: Path, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("engines: []\n")
    config.write_text(MINIMAL.split("engines:")[0] + "engines_from: list.yaml\n")
    assert load(config, {}).engines == ()
    config.write_text(MINIMAL.split("engines:")[0])
    with pytest.raises(ConfigError, match="there is no engine: list some in engines, name a file in engines_from, or"):
        load(config, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engines: [{name: a}]", r"list\.yaml: line 1: engines\[0\]\.url: the key is missing"),
        ("{", "is no valid YAML"),
        ("- a", "must hold a mapping"),
        ("engines: []\nother: 1", "line 2: other: unknown key"),
        ('engines: [{name: a, url: "http://h:9"}]', "have the same name 'a'"),
        ('engines: [{name: x, pair: p, role: decode, url: "http://h:9"}]', "pair 'p' needs an engine of role prefill"),
    ],
)
def test_what_is_refused(config: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        loaded(config, tmp_path / "list.yaml")


def test_a_pipe_would_keep_its_reader_for_ever(config: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    os.mkfifo(tmp_path / "lists" / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: cannot be read: it is no plain file"):
        loaded(config, tmp_path / "lists")


def test_what_is_not_there(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        loaded(config, tmp_path / "absent.yaml")


def test_a_server_is_one_engines(config: Path, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(listed("b", 1, ', more_urls: ["http://h:1/"]'))
    with pytest.raises(ConfigError, match="have the same url 'http://h:1'"):
        loaded(config, tmp_path / "list.yaml")


def test_a_look_tells_every_change(tmp_path: Path) -> None:
    assert look(tmp_path / "absent") == ()
    file = tmp_path / "a.yaml"
    file.write_text(listed("a", 1))
    looks = [look(tmp_path), look(file)]
    assert looks[0] == looks[1]
    file.write_text(listed("a", 12))
    looks.append(look(tmp_path))
    other = tmp_path / "other"
    other.write_text(listed("a", 12))
    other.replace(file)
    looks.append(look(tmp_path))
    (tmp_path / "b.json").write_text("{}")
    looks.append(look(tmp_path))
    assert len(set(looks)) == 4
    assert [path.name for path in files_of(tmp_path)] == ["a.yaml", "b.json"]
