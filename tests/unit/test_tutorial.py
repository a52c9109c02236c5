"""What can be known of the tutorial without running it: its blocks, its configuration, its variables."""

import re
import textwrap
from pathlib import Path

from tutorial import ROOT, TUTORIAL, blocks
from weightsync.orchestrator.cli.config import findings_of
from weightsync.orchestrator.settings.credentials import make_tokens
from weightsync.orchestrator.settings.settings import load


def test_every_block_of_commands_is_one_that_is_followed() -> None:
    fences = re.findall(r"^```(\w*)$", TUTORIAL.read_text(), re.MULTILINE)
    assert fences[::2] == ["bash"] * len(blocks())
    assert len(blocks()) >= 8


def test_its_configuration_loads_and_is_right_beside_its_tokens(tmp_path: Path) -> None:
    (text,) = re.findall(r"weightsync\.yaml <<END\n(.*?)^END$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "weightsync.yaml").write_text(textwrap.dedent(text))
    (tmp_path / "run").mkdir()
    make_tokens(tmp_path / "credentials")
    settings = load(tmp_path / "weightsync.yaml", {})
    wrong = [
        finding for finding in findings_of(settings) if finding.level == "error" and finding.check != "listen.port"
    ]
    assert wrong == []
    engine = settings.engines[0]
    for said in (f"WEIGHTSYNC_ENGINE={engine.name} ", f"WEIGHTSYNC_RUN_ID={settings.run.id} ", engine.url):
        assert said in TUTORIAL.read_text()
    assert f"WEIGHTSYNC_HUB_URL={settings.agents_url.replace('http', 'ws')}/agents" in TUTORIAL.read_text()


def test_its_variables_are_those_that_code_reads() -> None:
    named = set(re.findall(r"\b(WEIGHTSYNC_[A-Z_]+)", TUTORIAL.read_text()))
    code = [path.read_text() for folder in ("agents", "orchestrator") for path in (ROOT / folder).rglob("*.py")]
    assert {name for name in named if not any(f'"{name}"' in text for text in code)} == set()
