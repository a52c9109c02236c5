"""Takes the pictures of docs/page.md (``make pictures``), into the directory that it is given."""

import sys
import tempfile
from pathlib import Path

from browser import Tab, browser
from watched_fleet import WatchedFleet, watched_fleet

STEPS = 24


def save(tab: Tab, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tab.picture())
    print(path, path.stat().st_size)


def fail_once(fleet: WatchedFleet, step: int) -> None:
    """A round that an engine fails by standing still, and another that does not."""
    status = fleet.fleet.status
    with fleet.stopped_in_round("e2", step):
        fleet.fleet.until(lambda: any(r["outcome"] != "committed" for r in status()["rounds"]), "a round to fail")
    fleet.committed()


def main() -> None:
    out = Path(sys.argv[1])
    with (
        tempfile.TemporaryDirectory() as scratch,
        watched_fleet(Path(scratch), says="the server's tunnel is down") as fleet,
        browser(Path(scratch)) as chromium,
    ):
        tab = chromium.open(fleet.url, width=1100, height=860)
        tab.shows("Sign in")
        tab.write(fleet.token("operator"))
        tab.press("Enter")
        for step in range(1, STEPS):
            fleet.publish(step)
        tab.shows(f"step {STEPS - 1}", ".tiles")
        tab.shows("committed in", "#view-fleet .panel")
        save(tab, out / "page-fleet.png")
        tab.scheme("dark")
        tab.look("location.hash = 'plan'")
        tab.shows("over 3 edges", "#view-plan")
        save(tab, out / "page-plan.png")
        fail_once(fleet, STEPS)
        tab.scheme("dark")
        tab.look("location.hash = 'history'")
        tab.shows("1 failed", "#view-history")
        save(tab, out / "page-history.png")


if __name__ == "__main__":
    main()
