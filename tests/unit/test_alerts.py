"""The rules for Prometheus: each fires when it should, as promtool finds, and leads to what to do about it."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy" / "monitoring"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_promtool_finds_that_each_rule_fires_when_it_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None and "CI" not in os.environ:
        pytest.skip("promtool is not here (Debian has it in its package prometheus)")
    assert promtool is not None, "promtool is not here: .ci/run installs Debian's package prometheus"
    command = [promtool, "test", "rules", str(MONITORING / "tests.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_each_rule_is_seen_to_fire_and_not_to_fire() -> None:
    tried: dict[str, set[bool]] = {}
    for test in yaml.safe_load((MONITORING / "tests.yaml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            tried.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert tried == {rule["alert"]: {True, False} for rule in rules()}


def test_each_rule_leads_to_its_part_of_the_runbook_and_no_part_is_left() -> None:
    named = [rule["annotations"]["runbook"].partition("#") for rule in rules()]
    text = (ROOT / "docs" / "runbook.md").read_text()
    headings = re.findall(r"^## (\w+)$\n\n(.+)$", text, re.MULTILINE)
    assert {path for path, _, _ in named} == {"docs/runbook.md"}
    assert [anchor for _, _, anchor in named] == [heading.lower() for heading, _ in headings]
    assert [rule["alert"] for rule in rules()] == [heading for heading, _ in headings]
    assert all(rule["labels"]["severity"] in ("critical", "warning") for rule in rules())
