"""Reading the file: bounded, no surprises of YAML, a line for each key."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsync.orchestrator.settings import document
from weightsync.orchestrator.settings.document import MAX_CONFIG_BYTES, MAX_DEPTH, MAX_VALUES, Document
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import MAX_ENGINES, load


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"just text", b"\xff\xfe", b"x" * (MAX_CONFIG_BYTES + 1)])
def test_files_that_are_no_configuration(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    with pytest.raises(ConfigError, match=str(config)):
        load(config, {})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "absent.yaml", {})


@pytest.mark.parametrize(
    "bomb",
    [
        "x: &x [0]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1 or str()}'] * 9)}]\n" for n in range(1, 10)),
        "log: &log {level: *log}\n",
        "log: " + "{a: " * (MAX_DEPTH + 1) + "}" * (MAX_DEPTH + 1),
    ],
)
def test_aliases_that_grow_without_end_are_refused(tmp_path: Path, bomb: str) -> None:
    with pytest.raises(ConfigError, match="aliases written out") as caught:
        Document(tmp_path / "config.yaml", bomb)
    assert caught.value.problems[0].line


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "- " * 200_000, "? " * 200_000, "a: [" + "x," * 300_000, "a:\n" + " - b\n" * 200_000]
)
def test_reading_stops_at_the_limit_and_not_at_the_end(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = 0
    compose = yaml.SafeLoader.compose_node

    def counting(self: yaml.SafeLoader, *args: Any) -> Any:
        nonlocal composed
        composed += 1
        return compose(self, *args)

    monkeypatch.setattr(document, "MAX_VALUES", 5000)
    monkeypatch.setattr(yaml.SafeLoader, "compose_node", counting)
    with pytest.raises(ConfigError, match="more than 5000 values or 32 levels"):
        Document(tmp_path / "config.yaml", text)
    assert composed <= 5000


def test_the_limit_leaves_room_for_the_largest_fleet(tmp_path: Path) -> None:
    keys = 5
    assert MAX_ENGINES * (1 + 2 * keys) + 200 < MAX_VALUES


def test_ordinary_aliases_are_taken(tmp_path: Path) -> None:
    document = Document(tmp_path / "config.yaml", "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n")
    assert document.values == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


@pytest.mark.parametrize("text", ["? [a]\n: b\n", "a: {? [b] : c}\n", "a: " + "[" * 5000, "a: 2001-99-99\n", "a: \0\n"])
def test_what_yaml_cannot_construct_is_a_config_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        Document(tmp_path / "config.yaml", text)


def test_a_line_for_each_key_that_is_there(tmp_path: Path) -> None:
    document = Document(tmp_path / "config.yaml", "run:\n  id: a\nengines:\n  - name: x\n  - name: y\n    url: z\n")
    assert document.find(("run",)) == (1, True)
    assert document.find(("run", "id")) == (2, False)
    assert document.find(("engines", 1)) == (5, True)
    assert document.find(("engines", 1, "url")) == (6, False)
    for absent in (("log",), ("run", "directory"), ("engines", 2), ("run", "id", "x")):
        assert document.find(absent) == (None, False)


def test_a_pipe_is_read_once(config: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(config.read_text(),))
    writer.start()
    assert load(pipe, {}).run.id == "glm"
    writer.join()
