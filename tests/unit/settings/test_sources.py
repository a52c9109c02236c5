"""The environment above the file: which variable sets what, and which is refused."""

from pathlib import Path

import pytest
from settings_files import MINIMAL, Loaded, Refusal
from weightsync.orchestrator.settings.sections import FilesystemSection, NixlSection
from weightsync.orchestrator.settings.settings import load


def test_every_value_can_come_from_the_environment(loaded: Loaded) -> None:
    settings = loaded("", LISTEN__PORT="9", TRANSPORT__IN_FLIGHT_PER_PEER="7", TRANSPORT__BACKENDS="[UCX, GDS]",
        ENGINES__0__URL="http://other:1", ENGINES__1="{name: b, url: http://b:1, role: decode}",
        PAUSE__CACHE="keep", DEADLINES__PROBE_SECONDS="1.5", RUN__ID="77", ADVERTISE_URL="null",
    )  # fmt: skip
    assert settings.listen.port == 9
    assert settings.transport == NixlSection(backends=("UCX", "GDS"), in_flight_per_peer=7)
    assert [engine.url for engine in settings.engines] == ["http://other:1", "http://b:1"]
    assert settings.pause.cache == "keep"
    assert settings.deadlines.probe_seconds == 1.5
    assert settings.run.id == "77"


def test_the_environment_beats_the_file(loaded: Loaded) -> None:
    assert loaded("rescan_seconds: 3\n", RESCAN_SECONDS="4").rescan_seconds == 4


def test_other_variables_are_none_of_our_business(config: Path) -> None:
    assert load(config, {"WEIGHTSYNC_URL": "x", "PATH": "y"}).run.id == "glm"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("LISTN__PORT", "1", "listn: unknown key"),
        ("LISTEN__PORT", "http", "listen.port"),
        ("ENGINES__7__URL", "http://x", "fits nowhere"),
        ("RUN__ID__X", "1", "run.id"),
        ("LISTEN____PORT", "1", "names no key"),
        ("", "1", "names no key"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, says: str, refusal: Refusal) -> None:
    error = refusal(MINIMAL, {f"WEIGHTSYNC__{name}": value})
    assert f"environment variable WEIGHTSYNC__{name}" in str(error)
    assert says in str(error)


def test_single_entries_of_lists(loaded: Loaded) -> None:
    backends = "transport: {backends: [UCX, GDS]}\n"
    assert loaded(backends, TRANSPORT__BACKENDS__1="POSIX").transport == NixlSection(backends=("UCX", "POSIX"))
    assert loaded(backends, TRANSPORT__BACKENDS="[GDS]").transport == NixlSection(backends=("GDS",))
    engines = loaded("", ENGINES__1__NAME="b", ENGINES__1__URL="http://b:1", ENGINES__0__API_KEY_FILE="null").engines
    assert [engine.name for engine in engines] == ["a", "b"]
    assert [engine.name for engine in loaded("", ENGINES="[{name: c, url: 'http://c'}]").engines] == ["c"]


def test_a_mapping_replaces_the_one_of_the_file_and_a_key_does_not(loaded: Loaded) -> None:
    text = "pause: {mode: wait}\ntransport: {rails: 4}\n"
    pause = loaded(text, PAUSE="{cache: drop}").pause
    assert (pause.mode, pause.cache) == ("keep", "drop")
    pause = loaded(text, PAUSE__CACHE="keep").pause
    assert (pause.mode, pause.cache) == ("wait", "keep")
    assert loaded(text, TRANSPORT="{type: filesystem}").transport == FilesystemSection()
    (engine,) = loaded(ENGINES__0="{name: b, url: 'http://b'}").engines
    assert (engine.name, engine.url) == ("b", "http://b")


def test_null_takes_a_value_of_the_file_away(loaded: Loaded) -> None:
    settings = loaded(
        "trainer: {world: 4}\nadvertise_url: http://head:1\n", TRAINER__WORLD="null", ADVERTISE_URL="null"
    )
    assert settings.trainer.world is None
    assert settings.advertise_url is None


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("TRANSPORT", "TRANSPORT__RAILS"), "transport.rails"),
        (("ENGINES__0", "ENGINES__0__NAME"), "engines[0].name"),
        (("RUN__ID", "RUN__ID__X"), "run.id.x"),
    ],
)
def test_a_variable_beside_one_that_gives_the_whole_is_refused(
    names: tuple[str, ...], key: str, refusal: Refusal
) -> None:
    whole, part = (f"WEIGHTSYNC__{name}" for name in names)
    (problem,) = refusal(MINIMAL, {part: "1", whole: "{}"}).problems
    assert (problem.key, problem.variable) == (key, part)
    assert whole in problem.problem


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("RESCAN_SECONDS__X", "1", "rescan_seconds"),
        ("ENGINES__X", "1", "engines.x"),
        ("ENGINES__00__URL", "http://x", "engines.00"),
        ("ENGINES__2", "{name: b}", "engines[2]"),
        ("ENGINES__1__NAME", "b", "engines[1].url"),
        ("TRANSPORT", "null", "transport"),
        ("RUN", "{id: x", "run"),
        ("LOG__LEVEL", "", "log.level"),
        ("LISTEN__TOKEN", "hunter2", "listen.token"),
    ],
)
def test_no_variable_is_passed_over_in_silence(name: str, value: str, key: str, refusal: Refusal) -> None:
    error = refusal(MINIMAL, {f"WEIGHTSYNC__{name}": value})
    assert [(problem.key, problem.variable) for problem in error.problems] == [(key, f"WEIGHTSYNC__{name}")]
    assert "hunter2" not in str(error)


BOMB = "[" + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(9)) + "]"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ENGINES", BOMB, "aliases written out"),
        ("ENGINES", "[" * 5000, "aliases written out"),
        ("LOG", "{level: info, level: debug}", "log.level: the key is given twice"),
        ("ENGINES__²__URL", "http://x", "fits nowhere"),
        ("ENGINES__٣__URL", "http://x", "fits nowhere"),
        ("ENGINES__" + "9" * 5000 + "__URL", "http://x", "fits nowhere"),
        ("A__" * 5000 + "B", "1", "names no key"),
        ("LISTEN__PORT", "9" * 5000, "listen.port"),
        ("RUN__DIRECTORY", "/tmp/\udcff", "characters that none should have"),
        ("STATE_DIRECTORY", "~nobody-of-that-name/x", "the home of a user who has none"),
        ("LISTEN__HOST", "a..b", "is no name of a host"),
        ("ENGINES__0__URL", "http://h:99999", "Port out of range"),
    ],
)
def test_a_hostile_variable_is_one_line(name: str, value: str, says: str, refusal: Refusal) -> None:
    told = str(refusal(MINIMAL, {f"WEIGHTSYNC__{name}": value}))
    assert "environment variable WEIGHTSYNC__" in told
    assert says in told
    assert len(told.splitlines()) == 1
    assert len(told) < 2000
    assert told.isprintable()


def test_names_are_taken_in_any_case_and_once(loaded: Loaded, refusal: Refusal) -> None:
    assert loaded("", rescan_seconds="4").rescan_seconds == 4
    both = {"WEIGHTSYNC__RESCAN_SECONDS": "4", "WEIGHTSYNC__rescan_seconds": "5"}
    assert "gives all of that" in str(refusal(MINIMAL, both))
