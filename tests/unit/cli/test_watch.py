"""The live view: in place on a terminal, one after the other elsewhere, and patient."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import msgspec
from aiohttp import web
from command_line import cli
from credentials import TOKENS
from servers_here import only, served
from weightsync.orchestrator.cli.watch import framed
from weightsync.orchestrator.daemon.admin.views import StatusView


def telling(status: int = 200) -> web.Application:
    async def tell(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {TOKENS['viewer']}"
        view = StatusView(run="glm", state="step 40 is served", release="9.9")
        return web.Response(body=msgspec.json.encode(view), status=status, content_type="application/json")

    return only(status=tell)


async def test_away_from_a_terminal_each_look_follows_the_last(config: Path) -> None:
    async with served(telling()) as url:
        done = await cli("watch", "--config", config, "--count", "2", "--every", "0.01", WEIGHTSYNC__ADVERTISE_URL=url)
    assert done.code == 0, done.err
    assert done.out.count("run glm, daemon 9.9, epoch 0") == 2
    assert "\x1b" not in done.out


async def test_as_json_each_look_is_one_object_in_a_line(config: Path) -> None:
    asked = ("watch", "--json", "--config", config, "--every", "0.01")
    async with served(telling()) as url:
        done = await cli(*asked, "--count", "2", WEIGHTSYNC__ADVERTISE_URL=url)
    assert done.code == 0, done.err
    looks = [json.loads(line) for line in done.out.splitlines()]
    assert [(look["run"], look["state"]) for look in looks] == [("glm", "step 40 is served")] * 2
    async with served(telling(401)) as url:
        done = await cli(*asked, WEIGHTSYNC__ADVERTISE_URL=url)
    assert done.code == 77
    assert "refuses the token" in json.loads(done.out)["error"]


async def test_as_json_nobody_there_is_an_error_in_each_line(config: Path) -> None:
    done = await cli("watch", "--json", "--config", config, "--count", "2", "--every", "0.01", "--timeout", "5")
    assert done.code == 75
    assert ["cannot be reached" in json.loads(line)["error"] for line in done.out.splitlines()] == [True, True]


async def test_nobody_there_is_said_and_asked_again(config: Path) -> None:
    done = await cli("watch", "--config", config, "--count", "2", "--every", "0.01", "--timeout", "5")
    assert done.code == 75
    assert done.out.count("cannot be reached") == 2


async def test_a_refused_token_ends_it(config: Path) -> None:
    async with served(telling(401)) as url:
        done = await cli("watch", "--config", config, "--every", "0.01", WEIGHTSYNC__ADVERTISE_URL=url)
    assert done.code == 77


def test_a_terminal_is_given_back_as_it_was(config: Path) -> None:
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "weightsync.orchestrator.cli.main",
        "watch",
        "--config",
        str(config),
        "--count",
        "1",
    ]
    done = subprocess.run([*command, "--timeout", "5"], stdout=slave, timeout=60, check=False)
    os.close(slave)
    said = os.read(master, 65536).decode()
    os.close(master)
    assert done.returncode == 75
    assert said.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
    assert said.endswith("\x1b[?25h\x1b[?1049l")
    assert "cannot be reached" in said


def test_a_frame_fits_the_screen_and_leaves_nothing_of_the_last_one() -> None:
    assert framed("a\nb", 24) == "\x1b[Ha\x1b[K\r\nb\x1b[K\r\n\x1b[J"
    lines = framed("\n".join(map(str, range(100))), 24).removeprefix("\x1b[H").split("\r\n")
    assert len(lines) == 24  # the last one is empty: the cursor stays in the screen's last line
    assert lines[22].startswith("… and 78 more lines")
