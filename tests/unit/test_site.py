"""The documentation site: every page has its place, links lead somewhere, reference pages say what the code has.

``make docs`` builds it and finds broken links between pages.
"""

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import get_args

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from weightsync.agents import errors as agent_errors
from weightsync.agents.transport.registry import TRANSPORTS
from weightsync.orchestrator.cli.completion import words_of
from weightsync.orchestrator.cli.main import parser
from weightsync.orchestrator.core.round.phases import ROWS
from weightsync.orchestrator.core.round.transitions import TABLE, Action, Phase, Report
from weightsync.orchestrator.daemon.admin.views import EngineView, RoundRow, StatusView, VersionView
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.metrics import render
from weightsync.orchestrator.protocol import messages
from weightsync.orchestrator.protocol.markers import KINDS, Manifest
from weightsync.orchestrator.settings.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "site"


def loaded(name: str) -> ModuleType:
    """A module of the site's folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, reference, of_rounds = loaded("hooks"), loaded("reference_pages"), loaded("round_pages")
of_errors = loaded("error_pages")


def first_cells(page: str) -> list[str]:
    """The code span that each row of a page's tables begins with."""
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def test_every_page_has_its_place_in_the_navigation_and_no_place_is_empty() -> None:
    _, _, nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    placed = re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE)
    files = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(placed) == sorted([*files, *hooks.PAGES.values(), *hooks.generated()]), "each is one page's"


def test_each_how_to_is_a_page_of_its_own() -> None:
    _, _, nav = (ROOT / "mkdocs.yml").read_text().partition("\n  - How to:\n")
    pages = re.findall(r": ([\w/-]+\.md)$", nav.partition("\n  - ")[0], re.MULTILINE)
    assert pages == [
        "how-to/fsdp2.md", "adapters/trl.md", "adapters/verl.md", "adapters/vllm.md", "how-to/slurm.md",
        "how-to/systemd.md", "how-to/kubernetes.md", "adding-a-model.md", "how-to/new-engine.md",
        "how-to/new-transport.md",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "text", "shown"),
    [
        ("docs/operations.md", "[a](trainers.md#ranks)", "[a](trainers.md#ranks)"),
        ("docs/adapters/trl.md", "[a](../operations.md)", "[a](../operations.md)"),
        ("docs/protocol.md", "[a](../orchestrator/protocol/fields.py)", "a"),
        ("docs/performance.md", "[a](performance)", "a"),
        ("docs/architecture.md", "[a](../CONTRIBUTING.md)", "[a](contributing.md)"),
        ("docs/adapters/trl.md", "[a](../../README.md)", "[a](../index.md)"),
        ("README.md", "[a](docs/adapters/vllm.md) [b](deploy)", "[a](adapters/vllm.md) b"),
        ("README.md", "![a](docs/pictures/b.png)", "![a](pictures/b.png)"),
        ("README.md", "[a](https://example.org/x.md) [b](#c)", "[a](https://example.org/x.md) [b](#c)"),
        ("README.md", "[`a`](orchestrator)\n```\n[a](deploy)\n```\n[b](deploy)", "`a`\n```\n[a](deploy)\n```\nb"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(source: str, text: str, shown: str) -> None:
    assert hooks.with_links(text, source) == shown


def test_every_key_of_the_configuration_is_described_once() -> None:
    found = first_cells(reference.configuration())
    assert len(found) == len(set(found))
    assert {key.partition(".")[0].removesuffix("[]") for key in found} == set(Settings.model_fields)
    example = (ROOT / "deploy/config.example.yaml").read_text()
    assert {key.rpartition(".")[2] for key in found} <= set(re.findall(r"([a-z_]+):", example))
    assert {"transport.type", "transport.rails", "rendezvous.host", "engines[].more_urls"} <= set(found)


def test_every_command_is_described_with_its_options() -> None:
    page = reference.command_line()
    headings = set(re.findall(r"^## weightsync-orchestrator (.+)$", page, re.MULTILINE))
    words = {" ".join(each.after): each for each in words_of(parser())}
    leaves = {name for name in words if name and not any(other.startswith(f"{name} ") for other in words)}
    assert headings == leaves
    for name in leaves:
        section = page.partition(f"## weightsync-orchestrator {name}\n")[2].partition("\n## ")[0]
        for option in set(words[name].options) - {"-h", "--help"}:
            assert f"`{option}" in section, (name, option)


def test_every_metric_is_described() -> None:
    version = VersionView(step=1, generation=1, sequence=1)
    engine = EngineView(name="a", url="", role="both", state="serving", version=version)
    row = RoundRow(round="1.1", step=1, generation=1, attempt=1, outcome="committed")
    status = StatusView(run="a", state="", committed=version, engines=(engine,), rounds=(row,))
    told = text_string_to_metric_families(render(status, Meters(), 0.0).decode())
    names = {family.name + ("_total" if family.type == "counter" else "") for family in told}
    assert set(first_cells(reference.metrics())) == names
    assert "| `weightsync_rounds_total` | counter | `outcome`, `fault` |" in reference.metrics()


def test_every_error_of_an_agent_is_described_as_it_is() -> None:
    told = {kind.name: (kind.module, fault, retry, kind.says) for kind, fault, retry in of_errors.errors()}
    assert set(first_cells(of_errors.page())) == set(told) | set(of_errors.FAULTS)
    assert {fault for _, fault, _, _ in told.values()} <= set(of_errors.FAULTS) < set(get_args(messages.Fault))
    assert all(says for *_, says in told.values())
    for name in (
        "NixlMissingError", "TransferError", "DeadlineError", "BusyError", "PublishError", "MissingTensor", "TlsError",
        "CheckpointError", "PlaceError", "StandbyMissing", "FlipFailed", "NetDeviceMissing",
    ):  # fmt: skip
        module, fault, retry, _ = told[name]
        kind = getattr(importlib.import_module(f"weightsync.agents.{module}"), name)
        assert (kind.fault, kind.retry) == (fault, retry), name
    tree = (agent_errors.__doc__ or "").partition("AgentError\n")[2].partition("\n\n")[0]
    drawn = {
        name for row in tree.splitlines() for name in re.findall(r"[A-Z][a-z]\w+(?=,|$|  )", row.partition("── ")[2])
    }
    assert drawn <= set(told), "each that the tree of the agents' errors draws"


def test_every_message_is_described_with_its_fields() -> None:
    page = reference.messages_page()
    headings = set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    structs = [struct for _, group in reference.MESSAGES for struct in group]
    assert headings == {struct.__name__ for struct in structs}
    assert {messages.Hello, messages.Welcome, messages.Grant, messages.Closed} <= set(structs)
    for struct in structs:
        section = page.partition(f"### {struct.__name__}\n")[2].partition("\n### ")[0]
        assert {field.encode_name for field in msgspec.structs.fields(struct)} == set(
            re.findall(r"^\| `(\w+)` \| `", section, re.MULTILINE)
        )


def test_every_phase_and_report_of_a_round_is_drawn_and_listed() -> None:
    page = of_rounds.rounds()
    boxes = re.findall(r'font-weight="bold">(\w+)</text>', page)
    assert boxes == [phase.value for phase in Phase] == list(ROWS)
    assert page.count('marker-end="url(#to)"') == len(Phase) - 1
    assert first_cells(page) == [phase.value for phase in Phase]
    _, _, table = page.partition("## What is done about what happens")
    for report in Report:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {report.value} |")]
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells == [
            TABLE[phase][report].value.replace("_", " ") if report in TABLE[phase] else "" for phase in Phase
        ]
    assert "only forward" in page.partition("deciding</text>")[2][:80]
    assert set(of_rounds.DONE) == set(Action)


def test_every_transport_and_rendezvous_is_among_the_methods_to_choose_from() -> None:
    page = (ROOT / "docs" / "transfer-methods.md").read_text()
    schema = Settings.model_json_schema()
    for section in ("transport", "rendezvous"):
        for kind in schema["properties"][section]["discriminator"]["mapping"]:
            assert f"`{kind}`" in page, kind
    tags = {settings.__struct_config__.tag for settings in TRANSPORTS}
    assert set(schema["properties"]["transport"]["discriminator"]["mapping"]) == tags


def test_every_marker_is_described_with_its_fields() -> None:
    page = of_rounds.markers()
    assert first_cells(page) == [*KINDS, *(field.encode_name for field in msgspec.structs.fields(Manifest))]
