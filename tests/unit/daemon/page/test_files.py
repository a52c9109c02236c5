"""The page's files: all of them, with the headers that keep it harmless."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from weightsync.orchestrator.daemon.page.files import FOLDER, HEADERS, TYPES, file_routes

SCRIPTS = sorted(FOLDER.glob("*.js"))
TEXTS = sorted(FOLDER.iterdir())


@pytest.fixture
async def url() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_routes(file_routes())
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_each_file_is_served_as_what_it_is(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for path in TEXTS:
            async with session.get(f"{url}/page/{path.name}") as answer:
                assert await answer.read() == path.read_bytes()
                assert answer.headers["Content-Type"] == TYPES[path.suffix]
                assert {name: answer.headers[name] for name in HEADERS} == HEADERS
                assert answer.headers["Connection"] == "close"
        async with session.get(url) as answer:
            assert await answer.read() == (FOLDER / "index.html").read_bytes()


@pytest.mark.parametrize("name", ["nothing.js", "..%2Froutes.py", "..%2Fstatic%2Findex.html", "index.html%00"])
async def test_nothing_else_is(url: str, name: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/page/{name}") as answer:
        assert answer.status == 404


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_file_names_another_host(path: Path) -> None:
    found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", path.read_text())
    assert [name for name in found if name.partition("//")[2] != "www.w3.org/2000/svg"] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_imports_and_files_that_scripts_name_are_there(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r'"/page/([^"]+)"', text)) <= {file.name for file in TEXTS}
    for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "document.cookie"):
        assert banned not in text


def test_the_document_has_neither_scripts_nor_styles_nor_handlers_of_its_own() -> None:
    text = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]* src=)", text) == []
    assert "<style" not in text
    assert re.findall(r"\s(on\w+|style)=", text) == []
