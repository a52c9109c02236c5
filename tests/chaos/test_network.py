"""Links that are cut in both directions, in one, and slow: daemon, trainer and engines each on a host of its own.

The hosts are network namespaces, and NIXL's bytes pass over their links, too (``network.Network``). A cut is silent:
what is sent is lost, and nobody is told. What the engines' steps read is judged when the module's last test is over
(``Several.judge``).
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import HERE, Network, Unavailable
from several import NAMES, ORDINARY, PHASES, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

HARMED_TRAINER = str(Path(__file__).with_name("harmed_trainer.py"))
WAYS = {"both ways": {}, "that it hears nobody": {"mute": False}, "that nobody hears it": {"deaf": False}}
"""How one is cut off."""
NOTICED = 2.5
"""In seconds: longer than heartbeats may be missed, so that whoever is cut off meanwhile is known to be gone."""
RECOVERY = 5.0
"""From the moment that a link is whole again until everybody behind it serves, in seconds: TCP tries again, connections
and bytes alike, at most as long after its last attempt as the cut had lasted until then."""
SLOW_KILOBITS = 200
"""A version has 860 kilobits: longer than the patience, and well within the deadline of a transfer."""


@pytest.fixture(scope="module")
def apart(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("apart")
    engines = []
    for name in NAMES:
        host = network.hosts[name]
        engines.append(StandIn(name, directory, before=host.inside, host=host.address, env=host.environment))
    several = Several(directory, engines, host=network.hosts[HERE].address)
    trainer = network.hosts["trainer"]
    try:
        yield several.open(before=trainer.inside, env=trainer.environment)
        several.judge()
    finally:
        several.close()


@pytest.fixture(autouse=True)
def _mended(network: Network) -> Iterator[None]:
    yield
    network.mend()


def torn(several: Several) -> list[str]:
    return [name for name in NAMES if several.whole.engine(name)["torn"]]


@pytest.mark.parametrize("way", cases(WAYS, ("both ways",)))
@pytest.mark.parametrize("phase", cases(PHASES, ("WRITING",)))
def test_an_engine_that_is_cut_off_costs_the_others_the_patience(
    apart: Several, network: Network, phase: str, way: str
) -> None:
    with apart.stopped_at(PHASES[phase]) as step:
        network.cut_off("e0", **WAYS[way])
        began = time.monotonic()
    apart.ended(step)
    apart.others_serve("e0")
    apart.keep_going(("e1", "e2"), began)
    network.mend()
    apart.everywhere()


def test_an_engine_that_its_writer_cannot_reach_is_left_out_and_comes_back(apart: Several, network: Network) -> None:
    """It hears the daemon all the time. What the kernel still holds of the write lands when the link is whole again."""
    with apart.stopped_at(PHASES["EXPOSING"]) as step:
        network.cut("trainer", "e0")
        began = time.monotonic()
    apart.ended(step)
    apart.others_serve("e0")
    apart.keep_going(("e1", "e2"), began)
    assert torn(apart) == ["e0"]
    network.mend()
    apart.everywhere()


def test_an_engine_that_was_given_another_endpoint_is_reached_by_it(apart: Several, network: Network) -> None:
    """Its writer stays away for so long that the engine is asked for one before the link is whole again."""
    said = apart.whole.daemon_log()
    with apart.stopped_at(PHASES["EXPOSING"]) as step:
        network.cut("trainer", "e0")
    apart.ended(step)
    renewed = "e0/0 is asked for another endpoint"
    apart.whole.until(lambda: renewed in apart.whole.daemon_log()[len(said) :], "e0 to be asked for another", 30)
    network.mend()
    apart.everywhere()


@pytest.mark.parametrize("way", cases(WAYS, ("that nobody hears it",)))
def test_a_trainer_that_is_cut_off_with_a_grant_leaves_engines_paused_until_it_is_back(
    apart: Several, network: Network, way: str
) -> None:
    """It may still write, whatever it hears: mute, it has its grant, writes all of it and cannot say so."""
    with apart.stopped_at(PHASES["EXPOSING"]) as step:
        for sender, receiver in (("trainer", HERE), (HERE, "trainer")):
            if WAYS[way].get("mute" if sender == "trainer" else "deaf", True):
                network.cut(sender, receiver)
    apart.whole.until(lambda: torn(apart) == list(NAMES), "all to be torn", 30)
    apart.whole.until(lambda: apart.whole.status()["round"] is None, "the round to be over")
    served = [len(apart.engines[name].steps()) for name in NAMES]
    began = time.monotonic()
    apart.whole.until(lambda: time.monotonic() - began > NOTICED, "the cut to last")
    assert [len(apart.engines[name].steps()) for name in NAMES] == served
    network.mend()
    apart.ended(step)
    apart.everywhere()


@pytest.mark.parametrize("name", ["e0", pytest.param("trainer", marks=pytest.mark.long)])
def test_a_connection_of_which_one_end_is_gone_is_noticed_while_nobody_uses_it(
    apart: Several, network: Network, name: str
) -> None:
    """Half open: no packet says that the other end is gone. The others stand still as in a round without a fault."""
    network.cut_off(name)
    others = [other for other in NAMES if other != name]
    if name == "trainer":
        apart.whole.until(lambda: not apart.whole.status()["trainers"], "the trainer to be missed", 20)
    else:
        apart.whole.until(lambda: apart.whole.engine(name)["state"] == "unreachable", f"{name} to be missed", 20)
    began = time.monotonic()
    step = apart.begin()
    if name == "trainer":
        network.mend()
    apart.ended(step)
    apart.serve(others)
    apart.keep_going(others, began, ORDINARY)
    network.mend()
    apart.everywhere()


@pytest.mark.long
@pytest.mark.parametrize("phase", cases(PHASES, ("DECIDING",)))
def test_a_daemon_that_is_cut_off_from_all_goes_on_with_its_round(apart: Several, network: Network, phase: str) -> None:
    with apart.stopped_at(PHASES[phase]) as step:
        network.cut_off(HERE)
        began = time.monotonic()
    apart.whole.until(lambda: time.monotonic() - began > NOTICED, "the cut to last")
    network.mend()
    apart.ended(step)
    apart.everywhere()
    apart.keep_going(NAMES, began, NOTICED + RECOVERY)


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_a_daemon_that_is_killed_while_an_engine_is_cut_off(apart: Several, network: Network, phase: str) -> None:
    """The engine's end of the connection outlives the daemon that it led to."""
    with apart.stopped_at(PHASES[phase]) as step:
        network.cut_off("e0")
        apart.kill_daemon()
    apart.start_daemon()
    apart.ended(step)
    apart.others_serve("e0")
    network.mend()
    apart.everywhere()


@pytest.mark.long
def test_an_engine_behind_a_slow_link_costs_the_others_the_patience_and_catches_up(
    apart: Several, network: Network
) -> None:
    try:
        network.slow("e0", SLOW_KILOBITS)
    except Unavailable as reason:
        pytest.skip(f"no link can be made slow here: {reason}")
    began = time.monotonic()
    step = apart.begin()
    apart.ended(step)
    apart.others_serve("e0")
    apart.keep_going(("e1", "e2"), began)
    assert apart.whole.engine("e0")["state"] != "serving", "the link was not slow"
    apart.everywhere()
    network.mend()
    apart.publish()


@pytest.mark.long
def test_a_second_trainer_beside_one_that_is_cut_off_with_a_grant_waits_for_its_end(
    apart: Several, network: Network
) -> None:
    """Both live, on two hosts; the first has written what it was granted, which the daemon cannot know."""
    with apart.stopped_at(PHASES["EXPOSING"]):
        network.cut("trainer", HERE)
    apart.whole.until(lambda: torn(apart) == list(NAMES), "all to be torn", 30)
    another = network.hosts["another"]
    elsewhere = {**another.environment, "WEIGHTSYNC_TEST_HOST": "another"}
    apart.start_trainer(before=another.inside, env=elsewhere, script=HARMED_TRAINER)
    step = apart.begin()
    apart.whole.until(lambda: "is not proved dead" in apart.whole.status()["state"], "the first to be waited for", 30)
    assert torn(apart) == list(NAMES)
    assert apart.whole.status()["round"] is None
    network.mend()
    apart.ended(step)
    apart.everywhere()
