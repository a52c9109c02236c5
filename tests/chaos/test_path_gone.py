"""A network device is removed while a version is written over it: no end of the connection ever hears of that.

NIXL's bytes have two ways to the engine, of which UCX has taken one; the control connections have a way of their own.
What the engines' steps read is judged when the test is over (``Several.judge``).
"""

import time
from collections.abc import Iterator

import pytest
from network import HERE, Network
from several import NAMES, PHASES, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

WAYS = (1, 2)


@pytest.fixture(params=cases(("copy", "live"), ("copy",)))
def ways(
    request: pytest.FixtureRequest, network: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("ways")
    devices = {"UCX_NET_DEVICES": ",".join(network.add_way(way, "trainer", *NAMES) for way in WAYS)}
    engines = []
    for name in NAMES:
        host = network.hosts[name]
        env = {**host.environment, **devices}
        engines.append(StandIn(name, directory, before=host.inside, host=host.address, env=env, mode=request.param))
    several = Several(directory, engines, host=network.hosts[HERE].address)
    trainer = network.hosts["trainer"]
    try:
        yield several.open(before=trainer.inside, env={**trainer.environment, **devices})
        several.judge()
    finally:
        several.close()
        for device in devices["UCX_NET_DEVICES"].split(","):
            for name in ("trainer", *NAMES):
                network.remove_way(device, name)


def test_the_next_attempt_takes_another_way(ways: Several, network: Network) -> None:
    """Nobody mends anything, and nobody is restarted. The others stand still no longer than the patience."""
    [used] = [device for device in ("way1", "way2") if network.connections(device, "e0")]
    with ways.stopped_at(PHASES["EXPOSING"]) as step:
        network.remove_way(used, "e0")
        began = time.monotonic()
    ways.ended(step)
    ways.others_serve("e0")
    ways.keep_going(("e1", "e2"), began)
    ways.everywhere()
    assert "e0/0 is asked for another endpoint" in (ways.whole.directory / "daemon.log").read_text()
    ways.publish()
