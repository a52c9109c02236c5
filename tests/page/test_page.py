"""The operator's page in a real Chromium, on a real daemon with stand-in engines, while versions are pushed."""

import json
from collections.abc import Iterator

import pytest
from browser import Browser, Tab, browser
from watched_fleet import MARKUP, WatchedFleet, watched_fleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

VIEWS = ("fleet", "history", "plan", "audit")
NAMED = ("button", "link", "textbox", "searchbox", "combobox", "checkbox", "table", "image")
READABLE = 4.5
"""Contrast of text: https://www.w3.org/TR/WCAG22/#contrast-minimum"""

CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility({ opacityProperty: true }) || node.closest("svg")) continue;
    const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), node.textContent.trim().slice(0, 40)]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedFleet]:
    with watched_fleet(tmp_path_factory.mktemp("fleet"), engines=2) as started:
        started.publish(1)
        yield started


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


def signed_in(chromium: Browser, fleet: WatchedFleet, role: str, **size: int) -> Tab:
    tab = chromium.open(fleet.url, **size)
    tab.shows("Sign in")
    tab.write(fleet.token(role))  # the field has the focus
    tab.press("Enter")
    tab.shows("e0", "#view-fleet")
    return tab


def clean(tab: Tab, fleet: WatchedFleet) -> None:
    """Nothing went elsewhere, no script failed, the policy stopped nothing, and no stranger's text became markup."""
    assert [url for url in tab.requests if not url.startswith(f"{fleet.url}/")] == []
    assert tab.complaints == []
    assert tab.look("window.harmed ?? null") is None
    assert tab.look("document.querySelectorAll('img, body script, iframe, object').length") == 0


def go(tab: Tab, view: str) -> None:
    tab.look(f"location.hash = {json.dumps(view)}")
    tab.until(f"!document.getElementById('view-{view}').hidden", view)


def test_it_follows_rounds_as_they_happen(chromium: Browser, fleet: WatchedFleet) -> None:
    tab = signed_in(chromium, fleet, "viewer")
    tab.shows("live", "#link")
    for step in range(2, 10):
        fleet.publish(step)
    tab.shows("step 9", ".tiles")
    tab.until("document.querySelector('#view-fleet .panel h2').textContent === 'Last round: publish of step 9'", "it")
    tab.shows("committed in", "#view-fleet .panel")
    lanes = tab.text("#view-fleet .lanes")
    for name in ("Phases", "trainer/0", "e0", "e0/0", "e1", "e1/0"):
        assert name in lanes
    assert tab.look("document.querySelectorAll('.lanes .engine .p-stall').length") == 2
    assert tab.text(".engines").count("step 9") == 2
    go(tab, "history")
    tab.shows("The last 9 rounds", "#view-history")
    assert tab.look("document.querySelectorAll('#view-history figure rect').length") == 27
    tab.click("[aria-label^='Show round 1.9']")
    tab.shows("Round 1.9: publish of step 9, committed", "#view-history .panel")
    go(tab, "plan")
    tab.shows("over 2 edges", "#view-plan")
    assert tab.look("document.querySelectorAll('#view-plan rect.cell:not(.none)').length") == 2
    assert "model.embed_tokens.weight" in tab.text("#view-plan")
    clean(tab, fleet)


SENTENCE = "document.querySelector('#view-fleet .panel p').textContent"
QUIESCING = rf"Number({SENTENCE}.match(/: quiescing for ([\d.]+) s$/)?.[1] ?? 0)"
"""Seconds that this phase has lasted, if one or longer; 0 for any other sentence."""
LANES = """[...document.querySelectorAll('#view-fleet .lanes tbody tr')]
    .map((row) => [row.querySelector('th span').textContent, row.querySelector('.says').textContent])"""


def test_a_round_under_way_is_shown_while_it_waits(chromium: Browser, fleet: WatchedFleet) -> None:
    """An engine is stopped in it. From then on nothing happens in the round, and it is seen to last longer and longer;
    also by a page that is opened only then."""
    tab = signed_in(chromium, fleet, "viewer")
    tab.shows("Last round: publish of step", "#view-fleet .panel h2")
    with fleet.patient(60):
        with fleet.stopped_in_round("e0", 10):
            tab.shows("Round under way: publish of step 10", "#view-fleet .panel h2")
            tab.until("document.querySelector('#view-fleet .panel').hasAttribute('data-running')", "it to be marked")
            late = signed_in(chromium, fleet, "viewer")
            for page in (late, tab):
                page.send("Page.bringToFront")
                page.shows("Round under way: publish of step 10", "#view-fleet .panel h2")
                seconds = page.until(QUIESCING, "the phase to last a second")
                page.until(f"{QUIESCING} > {seconds}", "it to last longer")
                lanes = dict(page.look(LANES))
                assert lanes["e1/0"].startswith("quiesced at ")
                assert lanes["e0/0"] == "has said nothing yet"
                assert lanes["e0"].startswith("stands still for ")
                assert lanes["trainer/0"] == "waits for its grant"
            status = fleet.fleet.status()["round"]
            assert (status["phase"], status["version"]["step"]) == ("quiescing", 10)
        fleet.committed()
    for page in (late, tab):
        page.send("Page.bringToFront")
        page.shows("Last round: publish of step 10", "#view-fleet .panel h2")
        page.shows("committed in", "#view-fleet .panel")
        assert not page.look("document.querySelector('#view-fleet .panel').hasAttribute('data-running')")
        clean(page, fleet)


PROBLEMS = "[...document.querySelectorAll('#view-fleet .problems li')].map((li) => li.innerText).join('\\n')"


def test_a_fault_in_a_round_is_told_and_what_heals_is_shown_without_a_reload(
    chromium: Browser, fleet: WatchedFleet
) -> None:
    """An engine is killed in the middle of a round, then the daemon; both come back. The page is never loaded anew."""
    tab = signed_in(chromium, fleet, "viewer")
    tab.shows("Last round: publish of step", "#view-fleet .panel h2")
    tab.look("window.loaded = 'once'")
    with fleet.stopped_in_round("e0", 11):
        engine = fleet.standins["e0"].process
        assert engine is not None
        engine.kill()
        tab.until(f"/e0: .*(unreachable|torn)/.test({PROBLEMS})", "the engine's problem")
        assert "Fix" in tab.look(PROBLEMS) or "start its server" in tab.look(PROBLEMS)
        daemon = fleet.fleet.daemon
        assert daemon is not None
        daemon.kill()
        daemon.stop()
        tab.shows("not live: the daemon does not answer", "#link")
        fleet.fleet.start_daemon()
        tab.until("document.getElementById('link').textContent === 'live'", "the stream to come back by itself")
        tab.until(f"/e0: .*(unreachable|torn)/.test({PROBLEMS})", "the next daemon to tell of it")
    fleet.standins["e0"].start()
    fleet.committed()
    tab.shows("step 11", ".tiles")
    tab.until(f"!/e0:/.test({PROBLEMS})", "the problem to be gone")
    tab.until("document.querySelector('.engines').innerText.split('step 11').length === 3", "both to serve it")
    assert tab.look("window.loaded") == "once"
    others = [text for text in tab.complaints if not text.startswith("Failed to load resource: net::ERR_")]
    assert others == [], "the daemon was away for a while, and nothing else"


def test_a_wrong_token_is_told_and_a_viewer_cannot_act(chromium: Browser, fleet: WatchedFleet) -> None:
    tab = chromium.open(fleet.url)
    tab.shows("Sign in")
    tab.write("wrong")
    tab.press("Enter")
    tab.shows("The daemon refused: wrong or missing token", "#sign-in")
    assert tab.look("Object.keys(sessionStorage).includes('weightsync.token')") is False
    assert tab.text(".engines tbody") == ""
    tab.write(fleet.token("viewer"))
    tab.press("Enter")
    tab.shows("it takes an operator's token to act", "#view-fleet")
    assert (
        tab.look("[...document.querySelectorAll('#view-fleet button')].filter((b) => b.checkVisibility()).length") == 0
    )
    assert tab.look("document.cookie") == ""
    tab.click("#sign-out")
    tab.shows("Sign in")
    assert tab.look("sessionStorage.getItem('weightsync.token')") is None
    assert "e0" not in tab.text()


def test_strangers_texts_stay_texts_and_an_act_is_confirmed(chromium: Browser, fleet: WatchedFleet) -> None:
    """An engine's answer, an operator's name and reason: each is shown as it was written."""
    tab = signed_in(chromium, fleet, "operator")
    tab.shows(MARKUP, ".engines")
    tab.shows(MARKUP, ".problems")
    tab.click("[aria-label='Actions on e0']")
    tab.shows("Actions on e0", "#dialog")
    tab.click("#dialog li:nth-child(1) button")
    tab.shows("Drain e0?", "#dialog")
    assert fleet.fleet.status()["drains"] == {}, "nothing is sent before it is confirmed"
    tab.write(MARKUP)  # the reason has the focus
    tab.press("Tab")
    tab.write("<b>ann</b>")
    tab.click("#dialog [type=submit]")
    tab.shows("Drain e0: e0 takes part in no round until it is released", "#said")
    assert list(fleet.fleet.status()["drains"]) == ["e0"]
    tab.shows("drained: ", ".engines")
    tab.shows(MARKUP, ".engines")
    go(tab, "audit")
    tab.shows("drain e0", "#view-audit")
    for text in ("<b>ann</b> (operator, 127.0.0.1)", MARKUP):
        assert text in tab.text("#view-audit")
    go(tab, "fleet")
    tab.click("[aria-label='Actions on e0']")
    tab.click("#dialog li:nth-child(3) button")
    tab.shows("Release e0?", "#dialog")
    tab.click("#dialog [type=submit]")
    tab.shows("Release e0: ", "#said")
    assert fleet.fleet.status()["drains"] == {}
    clean(tab, fleet)
    tab.click("#view-fleet .verbs button:nth-child(3)")
    tab.shows("Roll back?", "#dialog")
    tab.click("#dialog [type=submit]")
    assert tab.look("document.getElementById('dialog').open"), "what cannot be undone needs a second yes"
    tab.click("#act-sure")
    tab.click("#dialog [type=submit]")
    tab.shows("no rollback: ", "#dialog")  # live engines have no standby: the daemon's sentence


def test_all_of_it_works_by_keyboard_and_is_named(chromium: Browser, fleet: WatchedFleet) -> None:
    tab = signed_in(chromium, fleet, "operator")
    tab.send("Page.reload")
    tab.until(
        "document.activeElement === document.body && document.querySelector('.engines button') !== null", "it signed in"
    )
    seen = []
    for _ in range(60):
        tab.press("Tab")
        name = tab.look("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || ''")
        if name in seen or tab.look("document.activeElement === document.body"):
            break
        shown = tab.look("getComputedStyle(document.activeElement).outlineStyle")
        assert shown == "solid", f"the focus is not seen on {name}"
        seen.append(name)
    assert seen[:7] == ["Skip to the content", "Theme: system", "Sign out", "Fleet", "History", "Plan", "Audit"]
    assert {"Actions on e0", "Actions on e1", "Actions on stranger", "Abort the round…"} <= set(seen)

    tab.look("document.querySelector('[aria-label=\"Actions on e1\"]').focus()")
    tab.press("Enter")
    tab.shows("Actions on e1", "#dialog")
    for _ in range(12):  # the focus cannot leave the page's dialog
        tab.press("Tab")
        assert tab.look("document.activeElement === document.body || dialog.contains(document.activeElement)")
    tab.press("Escape")
    tab.until("!document.getElementById('dialog').open", "the dialog to close")
    assert tab.look("document.activeElement.getAttribute('aria-label')") == "Actions on e1"

    for view in VIEWS:
        go(tab, view)
        nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
        roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
        for landmark in ("banner", "navigation", "main"):
            assert roles.count(landmark) == 1, (view, landmark)
        assert roles.count("heading") >= 1
        nameless = [
            node["role"]["value"]
            for node in nodes
            if not node["ignored"] and not node.get("name", {}).get("value")
            if node["role"]["value"]
            in ("button", "link", "textbox", "searchbox", "combobox", "checkbox", "table", "image")
        ]
        assert nameless == [], view
        assert tab.look("document.querySelectorAll('nav [aria-current=page]').length") == 1
        assert tab.look(f"document.activeElement.id === 'title-{view}'") or view == "fleet"
    assert tab.look("document.getElementById('announce').getAttribute('aria-live')") == "polite"
    assert "is committed" in tab.look("document.getElementById('announce').textContent")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_read_in_both_themes_and_on_a_phone(chromium: Browser, fleet: WatchedFleet, theme: str) -> None:
    tab = signed_in(chromium, fleet, "operator", width=360, height=740)
    tab.scheme(theme)
    dark = tab.look("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert dark == (theme == "dark")
    for width in (360, 1280):
        tab.size(width, 740)
        for view in VIEWS:
            go(tab, view)
            assert tab.look("document.documentElement.scrollWidth") == width, f"{view} is wider than the screen"
            faint = [(ratio, text) for ratio, text in tab.look(CONTRASTS) if ratio < READABLE]
            assert faint == [], (view, width)
    other = {"light": "dark", "dark": "light"}[theme]
    while tab.text("#theme") != f"Theme: {other}":
        tab.click("#theme")
    assert (tab.look("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)") == (other == "dark")


def test_a_page_that_is_not_seen_holds_no_stream_and_one_without_a_daemon_says_so(
    chromium: Browser, fleet: WatchedFleet
) -> None:
    tab = signed_in(chromium, fleet, "viewer")

    def streams() -> int:
        tab.look("1")
        return sum(url.endswith("/stream") for url in tab.requests)

    assert streams() == 1
    hide = "Object.defineProperty(document, 'hidden', {configurable: true, value: %s});"
    tab.look(hide % "true" + "document.dispatchEvent(new Event('visibilitychange'))")
    tab.until_done(lambda: (tab.look("1"), tab.given_up)[1] == 1, "the stream to be given up")
    tab.look(hide % "false" + "document.dispatchEvent(new Event('visibilitychange'))")
    tab.until_done(lambda: streams() == 2, "a new stream")
    tab.shows("live", "#link")

    assert fleet.fleet.daemon is not None
    fleet.fleet.daemon.stop()
    tab.shows("not live: the daemon does not answer", "#link")
    assert tab.look("document.getElementById('main').hasAttribute('data-stale')")
    fleet.fleet.start_daemon()
    tab.until("document.getElementById('link').textContent === 'live'", "the stream to come back by itself")
    tab.until("document.querySelector('#view-fleet .panel').hidden", "the round of the daemon before to be gone")
    fleet.publish(20)
    tab.shows("step 20", ".tiles")
