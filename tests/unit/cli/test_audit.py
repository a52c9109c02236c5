"""``audit verify`` as an operator meets it."""

import json
from pathlib import Path

from command_line import cli, process
from weightsync.orchestrator.daemon.admin.audit import Audit, AuditLine
from weightsync.orchestrator.settings.settings import load


def append(directory: Path, verb: str) -> str:
    directory.mkdir(exist_ok=True)
    return Audit(directory).append(AuditLine(
        time="t", who="ann", address="::1", credential="operator", verb=verb, target="", reason="", result="done"
    ))  # fmt: skip


async def test_a_whole_log_a_broken_one_and_one_that_was_cut(config: Path) -> None:
    state = load(config, {}).state_directory
    assert (await cli("audit", "verify", "--config", config)).out == f"no line yet in {state}\n"
    first, second = append(state, "hold"), append(state, "release")
    done = await process("audit", "verify", "--config", config, "--noted", first)
    assert (done.code, done.out) == (0, f"lines 1 to 2 are whole; the last one's hash: {second}\n")
    assert (await cli("audit", "verify", "--state", state)).code == 0
    told = json.loads((await cli("audit", "verify", "--state", state, "--json")).out)
    assert told == {"first": 1, "last": 2, "head": second, "problems": []}
    file = state / "audit.jsonl"
    file.write_text(file.read_text().splitlines(True)[0])
    cut = await cli("audit", "verify", "--state", state, "--noted", second)
    assert (cut.code, f"no line has the hash {second}" in cut.err) == (65, True)
    append(state, "abort")
    file.write_text(file.read_text().replace("hold", "drain"))
    broken = await cli("audit", "verify", "--config", config)
    assert (broken.code, broken.out) == (65, "")
    assert "line 1 is not what it was when this one was written" in broken.err
    told = await cli("audit", "verify", "--config", config, "--json")
    assert (told.code, told.err, len(json.loads(told.out)["problems"])) == (65, "", 1)


async def test_what_it_is_not_told(tmp_path: Path) -> None:
    done = await cli("audit", "verify")
    assert (done.code, "give --config PATH" in done.err) == (2, True)
    mistyped = await cli("audit", "verify", "--state", tmp_path / "mistyped")
    assert (mistyped.code, "mistyped: is no directory" in mistyped.err) == (78, True)
    (tmp_path / "audit.jsonl").mkdir()
    done = await cli("audit", "verify", "--state", tmp_path)
    assert (done.code, "Is a directory" in done.err) == (78, True)
