"""The settings as the core is told them."""

from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path

import pytest
from weightsync.orchestrator.core.policy import Admission, GroupAddress, Policy
from weightsync.orchestrator.daemon.policy import policy_of
from weightsync.orchestrator.protocol.messages import FilesystemSettings, NixlSettings
from weightsync.orchestrator.settings.settings import Settings, load


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"""
run: {{id: glm, directory: {tmp_path / "run"}}}
state_directory: {tmp_path / "state"}
credentials: {tmp_path / "credentials"}
engines: [{{name: e0, url: "http://127.0.0.1:1"}}]
""")
    return path


@pytest.fixture
def settings(config: Path) -> Settings:
    return load(config, {})


def test_every_deadline_of_the_settings_reaches_the_core(settings: Settings) -> None:
    changed = settings.model_copy(
        update={"deadlines": settings.deadlines.model_copy(update={
            name: number + 1000.0 for number, name in enumerate(type(settings.deadlines).model_fields)
            if name.endswith("_seconds")
        })}
    )  # fmt: skip
    policy = policy_of(changed)
    named = {name.removesuffix("_seconds") for name in type(settings.deadlines).model_fields}
    for field in fields(Policy):
        if field.name in named:
            assert getattr(policy, field.name) == getattr(changed.deadlines, f"{field.name}_seconds"), field.name
    assert {"attach", "probe", "probe_interval"} <= named
    assert (policy.run_id, [engine.name for engine in policy.engines]) == ("glm", ["e0"])
    assert policy.transport == NixlSettings()


def test_files_travel_by_the_run_directory_of_the_settings(config: Path) -> None:
    settings = load(config, {"WEIGHTSYNC__TRANSPORT__TYPE": "filesystem"})
    assert policy_of(settings).transport == FilesystemSettings(str(settings.run.directory))


def test_the_rendezvous_is_a_group_only_where_the_settings_name_one(config: Path) -> None:
    assert policy_of(load(config, {})).group is None
    store = {"WEIGHTSYNC__RENDEZVOUS": "{type: tcpstore, host: head, port: 29502, timeout_seconds: 60}"}
    assert policy_of(load(config, store)).group == GroupAddress("head", 29502, 60.0)


def test_transport_pairs_and_retries(config: Path) -> None:
    pair = "[{name: p, url: 'http://p', role: prefill, pair: x}, {name: d, url: 'http://d', role: decode, pair: x}]"
    policy = policy_of(
        load(
            config,
            {
                "WEIGHTSYNC__ENGINES": pair,
                "WEIGHTSYNC__RETRY__GIVE_UP_SECONDS": "70",
                "WEIGHTSYNC__COMMIT__MIN_ENGINES": "2",
            },
        )
    )
    assert [(engine.name, engine.pair) for engine in policy.engines] == [("p", "x"), ("d", "x")]
    assert policy.retry == 70.0
    assert (policy.min_engines, policy.quorum(5), policy.quorum(1)) == (2, 2, 1)
    assert isinstance(policy.transport, NixlSettings)
    files = policy_of(load(config, {"WEIGHTSYNC__TRANSPORT__TYPE": "filesystem"}))
    assert isinstance(files.transport, FilesystemSettings)


def test_who_may_come_by_itself_reaches_the_core(config: Path) -> None:
    assert policy_of(load(config, {})).admission is None
    admit = (
        "{names: [a*], hosts: [10.1.0.0/16, '*.GPU.example', '::1'], at_most: 3, leave_seconds: 30, proxies: ['::2']}"
    )
    policy = policy_of(load(config, {"WEIGHTSYNC__ENGINES_ADMIT": admit}))
    networks = (ip_network("10.1.0.0/16"), ip_network("::1"))
    assert policy.admission == Admission(("a*",), ("*.gpu.example",), networks, 3, 30.0, (ip_network("::2"),))
    assert [engine.servers for engine in policy.engines] == [("http://127.0.0.1:1",)]
