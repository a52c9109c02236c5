"""A proxy before one engine of three loses a call, its answer, or withholds it: the others go on, and it comes back.

What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

from collections.abc import Iterator

import pytest
from proxy import Proxy
from several import NAMES, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

CALLS = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/collective_rpc")
"""Those of a round, in their order; the last resumes."""
HARMED = [f"{what} of {path}" for what in ("request", "answer", "late answer") for path in CALLS]
SHORT = ("answer of /pause", "request of /update_weights", "late answer of /collective_rpc")


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Several, Proxy]]:
    directory = tmp_path_factory.mktemp("behind")
    engines = [StandIn(name, directory) for name in NAMES]
    proxy = Proxy(engines[0].port)
    engines[0].url = proxy.url
    several = Several(directory, engines)
    try:
        several.open()
        yield several, proxy
        several.judge()
    finally:
        several.close()
        proxy.close()


@pytest.mark.parametrize("harmed", cases(HARMED, SHORT))
def test_one_whose_call_is_lost_costs_the_others_the_patience(behind: tuple[Several, Proxy], harmed: str) -> None:
    several, proxy = behind
    what, _, path = harmed.partition(" of ")
    proxy.harm(path, what)
    step = several.begin()
    several.ended(step)
    several.others_serve("e0")
    assert proxy.harmed.wait(30)
    several.keep_going(("e1", "e2"), proxy.at)
    proxy.release()
    several.everywhere()
