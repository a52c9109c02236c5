"""Histories in which a fleet once stood still or served the wrong weights, each with what must come of it."""

import pytest
from moments import CASES, PHASES, begins, call, sent
from places import Disk
from simulated_daemon import SimulatedDaemon
from weightsync.orchestrator.core.events import Call, RollbackAsked
from weightsync.orchestrator.core.records import Decided
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.messages import Closed, Left, Outcome, Quiesced, Verified
from weightsync.orchestrator.protocol.names import Member
from wires import Agent
from world import World


def everybody(mode: Lands) -> dict[str, Lands]:
    """All engines land in ``mode``."""
    return {f"e{number}": mode for number in range(4)}


def assert_all_serve(world: World, within: float) -> None:
    """Every engine serves the last committed version."""
    ends = world.now + within
    while world.judge.behind() and world.now < ends:
        world.run(world.now + 0.25)
    assert not world.judge.behind(), f"{world.judge.behind()}\n{world.story()}"


def assert_versions_go_on(world: World, seconds: float = 10.0) -> None:
    before = len(world.judge.committed)
    world.run(world.now + seconds)
    assert len(world.judge.committed) >= before + 3, world.story()


# ---------------------------------------------------------------------------------------- what is owed after a restart
def test_a_fleet_that_was_paused_and_holds_the_committed_version_is_resumed_after_a_restart() -> None:
    world = World(11, engines=2, idle=True)
    world.run(5.0)
    world.idle = False
    world.job.publish_soon()
    world.when(call(Call.UPDATE), lambda: world.faults.cut.update(world.servers))
    world.faults.begin(world.servers)
    world.run(40.0)
    world.jobs[-1].die()  # nobody publishes any more
    world.kill_daemon(for_seconds=1.0)
    world.faults.cut.clear()
    world.run(42.0)
    assert_all_serve(world, within=10.0)


@pytest.mark.parametrize("mode", ["live", "copy", "flip"])
def test_a_hold_of_a_daemon_that_is_gone_is_over(mode: Lands) -> None:
    """Its worker was told after it had left its last round, whose words it repeats to the next daemon."""
    world = World(14, engines=2, lands=everybody(mode), idle=True)
    world.run(10.0)
    world.faults.begin(["e1"])
    world.kill_daemon(for_seconds=1.0)
    world.servers["e1"].workers[0].held = True
    world.servers["e1"].set_paused(True)
    world.run(12.0)
    assert_all_serve(world, within=10.0)


@pytest.mark.parametrize("restart", [True, False])
def test_an_engine_that_could_not_be_resumed_is_resumed_later(restart: bool) -> None:
    world = World(12, engines=2, idle=True)
    world.run(0.1)
    world.servers["e1"].ill[Call.RESUME] = "500"
    world.faults.begin(world.servers)
    world.run(20.0)
    if restart:
        world.kill_daemon(for_seconds=1.0)
        world.run(22.0)
    world.servers["e1"].ill.clear()
    assert_all_serve(world, within=8.0)


def test_a_pause_that_is_performed_late_is_undone() -> None:
    world = World(13, engines=2, idle=True)
    world.run(6.0)
    world.faults.begin(world.servers)
    world.servers["e1"].set_paused(True)  # as a call of long ago would
    assert_all_serve(world, within=4.0)


def test_an_update_call_that_is_performed_late_delays_nobody() -> None:
    """It is of a round that is over; its worker stands in a window that no round knows."""
    world = World(14, engines=3)
    world.run(6.0)
    server = world.servers["e2"]
    end = world.faults.begin(["e2"])
    server.ill[Call.UPDATE] = "hangs"
    calls = []
    world.when(lambda what: call(Call.UPDATE, "e2")(what) and not calls.append(what), lambda: None)
    world.run(12.0)
    server.ill.clear()
    server.perform(calls[0], lambda answer: None)
    assert_versions_go_on(world)
    end()
    world.run(40.0)
    world.run_until_quiet()
    assert_all_serve(world, within=8.0)


# --------------------------------------------------------------------------------------------------- retries, by time
@pytest.mark.parametrize("seconds", [2.0, 10.0, 40.0])
def test_a_glitch_of_the_network_leaves_nobody_torn(seconds: float) -> None:
    world = World(15, engines=3, idle=True, retry=5.0)
    world.run(5.0)
    world.idle = False
    world.faults.begin(world.servers)
    world.faults.broken_edges.update(world.servers)
    world.job.publish_soon()
    world.run(5.0 + seconds)
    world.idle = True
    world.faults.broken_edges.clear()
    assert_all_serve(world, within=30.0)


# ------------------------------------------------------------------------------------------------------- connections
def agent_of(world: World, who: str) -> Agent:
    return world.job.ranks[0] if who == "trainer" else world.servers["e0"].workers[0]


@pytest.mark.parametrize("who", ["trainer", "engine"])
@pytest.mark.parametrize(("mode", "phase"), CASES)
def test_a_hello_before_the_end_of_the_last_connection_is_noticed(mode: Lands, phase: str, who: str) -> None:
    world = World(16, engines=2, lands=everybody(mode))
    world.run(6.0)

    def reset() -> None:
        world.faults.hurt(world.hurt_by(agent_of(world, who)))
        link = agent_of(world, who).link
        assert link is not None
        link.reset_half()

    world.when(begins(mode, phase), reset)
    assert_versions_go_on(world)
    world.run_until_quiet()
    assert_all_serve(world, within=5.0)


@pytest.mark.parametrize("word", [Quiesced, Closed, Verified, Left])
def test_a_word_that_is_lost_with_its_connection_is_said_again(word: type) -> None:
    """The round goes on within the seconds of the reconnect, not after the deadline of the phase."""
    world = World(17, engines=2, trainers=1, ranks=1, quiesce=60.0, transfer=60.0, verify=60.0, finish=60.0)
    world.run(6.0)
    agents: list[Agent] = [*world.job.ranks] if word is Closed else [*world.servers["e0"].workers]
    lost = []

    for agent in agents:
        say = agent.say_once

        def losing(said: object, agent: Agent = agent, say: object = say) -> None:
            say(said)  # type: ignore[operator]
            if isinstance(said, word) and not lost and agent.link is not None:
                lost.append(said)
                agent.link.reset_half()

        agent.say_once = losing  # type: ignore[method-assign,assignment]
    world.faults.begin(world.servers)
    world.run(16.0)
    assert lost
    assert_versions_go_on(world, seconds=5.0)


# ----------------------------------------------------------------------------------------- after the decision: forward
@pytest.mark.parametrize("how", ["connection", "answers"])
def test_a_version_whose_only_engine_was_resumed_is_committed(how: str) -> None:
    world = World(18, engines=1, ranks=1, trainers=1)
    world.run(6.0)

    def blip() -> None:
        if how == "answers":
            world.faults.cut_answers.add("e0")
            world.later(8.0, world.faults.cut_answers.clear)
        else:
            link = world.servers["e0"].workers[0].link
            assert link is not None
            link.closed_by_agent("connection reset")
            world.servers["e0"].workers[0].unreachable_until = world.now + 2.0

    world.faults.begin(world.servers)
    world.when(call(Call.RESUME), blip)
    world.run(6.0 + 3.0)
    world.run(40.0)
    world.run_until_quiet()
    assert_all_serve(world, within=5.0)
    assert not world.judge.failed & set(world.judge.ever_served), world.story()


# ---------------------------------------------------------------------------------------------------------- trainers
def test_a_trainer_that_returns_with_fewer_ranks_after_a_torn_round() -> None:
    world = World(19, engines=2, trainers=2)
    world.run(6.0)
    world.when(PHASES["writing"], lambda: world.kill_trainer(size=1, for_seconds=2.0))
    world.run(20.0)
    assert_versions_go_on(world)
    world.run_until_quiet()
    assert_all_serve(world, within=8.0)


@pytest.mark.parametrize("dies", [True, False], ids=["declared dead", "it closes"])
def test_a_trainer_that_wakes_up_beside_its_successor_mixes_nothing(dies: bool) -> None:
    """Stopped in the middle of a grant, replaced on another host, thawed: it writes on. Nobody can stop it."""
    world = World(20, engines=2, trainers=1)
    world.run(6.0)
    first = world.job

    def stop() -> None:
        for rank in first.ranks:
            rank.stop()

    world.faults.begin(world.servers)
    world.when(PHASES["writing"], lambda: world.later(0.03, stop))
    world.run(9.0)
    assert any(rank.stopped and rank.open for rank in first.ranks), world.story()
    world.start_trainer(host="another host")
    world.run(40.0)
    for rank in first.ranks:
        rank.thaw()
    world.run(50.0)
    if dies:
        first.die()
        world.declare_dead([Member("trainer", "", 0)])
    assert_versions_go_on(world, seconds=30.0)
    world.run_until_quiet()
    assert_all_serve(world, within=10.0)


# ------------------------------------------------------------------------------------------------------------- pairs
@pytest.mark.parametrize("bad", ["e0", "e1"])
def test_a_pair_serves_one_version_or_none(bad: str) -> None:
    world = World(21, engines=3, pairs=[("e0", "e1")])
    world.run(6.0)
    world.faults.begin(["e0", "e1"])
    world.faults.cut.add(bad)
    for _ in range(60):
        world.run(world.now + 0.5)
        assert not world.judge.pairs_apart(), world.story()
    world.faults.cut.clear()
    world.run(world.now + 20.0)
    world.run_until_quiet()
    assert_all_serve(world, within=8.0)


# ------------------------------------------------------------------------------------------------------ the daemon
@pytest.mark.parametrize(("mode", "phase"), CASES)
@pytest.mark.parametrize("durable", [True, False], ids=["after a while", "at once"])
def test_a_daemon_that_dies(mode: Lands, phase: str, durable: bool) -> None:
    world = World(22, engines=2, lands=everybody(mode))
    world.run(6.0)
    world.when(begins(mode, phase), lambda: world.later(0.02 if durable else 0.0, lambda: world.kill_daemon(1.0)))
    world.run(12.0)
    assert_versions_go_on(world)
    world.run_until_quiet()
    assert_all_serve(world, within=5.0)


@pytest.mark.parametrize(("mode", "phase"), CASES)
def test_a_daemon_that_dies_and_a_trainer_that_is_gone(mode: Lands, phase: str) -> None:
    """Nobody publishes any more, and nobody can repair: who holds the committed version serves."""
    world = World(23, engines=2, lands=everybody(mode))
    world.run(6.0)
    world.when(begins(mode, phase), lambda: (world.kill_daemon(1.0), world.job.die()))  # type: ignore[arg-type,func-returns-value]
    world.run(40.0)
    for name, server in world.servers.items():
        whole = all(w.applied == world.judge.committed[-1] and not w.torn for w in server.workers)
        assert server.serves == whole, f"{name}\n{world.story()}"
        assert whole or mode == "live", "a shadow engine switches without a trainer, or keeps what it has"


@pytest.mark.parametrize("phase", PHASES)
def test_an_engine_whose_daemon_is_gone_serves_again_unless_it_may_be_torn(phase: str) -> None:
    """By the lease that it was given. Of a round that was decided it is told by the next daemon."""
    world = World(24, engines=2, lease=2.0)
    world.run(6.0)
    world.when(PHASES[phase], lambda: world.later(0.01, lambda: world.kill_daemon(60.0)))
    world.run(40.0)
    assert world.daemon is not None
    assert not world.daemon.alive
    for name, server in world.servers.items():
        whole = all(worker.applied is not None and not worker.torn for worker in server.workers)
        assert server.serves == whole, f"{name}: {[w.status for w in server.workers]}\n{world.story()}"
    assert phase not in ("pausing", "quiescing") or all(server.serves for server in world.servers.values())
    world.run(80.0)
    assert_versions_go_on(world)
    world.run_until_quiet()
    assert_all_serve(world, within=5.0)


def test_memory_that_was_verified_is_used_when_the_daemon_that_decided_is_gone() -> None:
    """Its workers have left as torn; the word of the next daemon mends them, though no trainer is there to write."""
    world = World(25, engines=2)
    world.run(6.0)
    version = []

    def durable(what: object) -> bool:
        if isinstance(what, Decided):
            version.append(what.version)
        return isinstance(what, Decided)

    def both() -> None:
        world.kill_daemon(60.0)
        world.job.die()

    world.when(durable, lambda: world.later(0.004, both))
    world.run(100.0)
    assert world.judge.committed[-1] == version[0]
    assert_all_serve(world, within=5.0)


def test_a_trainer_that_wakes_up_after_a_restart_does_not_take_the_place_of_its_successor() -> None:
    world = World(26, engines=2, trainers=1)
    world.run(6.0)
    first = world.job
    world.faults.begin(world.servers)
    for rank in first.ranks:
        rank.stop()
    world.run(12.0)
    world.start_trainer(host="another host")
    world.run(16.0)
    world.kill_daemon(for_seconds=1.0)
    for rank in world.job.ranks:
        rank.unreachable_until = 30.0
    for rank in first.ranks:
        rank.thaw()
    world.run(28.0)
    assert all(rank.ended for rank in first.ranks), world.story()
    first.die()
    world.declare_dead([Member("trainer", "", 0)])
    world.run(32.0)
    assert_versions_go_on(world)


def test_a_trainer_of_another_size_whose_predecessor_died_with_its_host() -> None:
    """Nobody has noticed its end yet when the next one says Hello."""
    world = World(27, engines=2, trainers=2)
    world.run(6.0)
    world.faults.begin(world.servers)
    world.kill_trainer(size=1, for_seconds=0.2, silently=True)
    world.run(16.0)
    assert_versions_go_on(world)


@pytest.mark.parametrize("seed", range(8))
def test_two_daemons_of_one_copied_state_directory_mix_nothing(seed: int) -> None:
    """Of the same epoch, journal and round numbers: only the nonce of their lives tells them apart."""
    world = World(seed, engines=3, trainers=1)
    world.run(6.0)
    world.faults.begin(world.servers)
    copied = Disk(world, world.disk)
    world.kill_daemon(for_seconds=0.5)
    world.run(7.0)
    first = world.daemon
    second = SimulatedDaemon(world, copied)
    assert first is not None
    assert (first.fleet.epoch, first.fleet.journal_id) == (second.fleet.epoch, second.fleet.journal_id)
    for _ in range(40):
        world.daemon = world.rng.choice((first, second))
        agent = world.rng.choice(world.agents())
        if agent.link is not None:
            agent.link.closed_by_agent("it looks for the daemon anew")
        world.run(world.now + world.rng.uniform(0.1, 2.0))
    second.die()
    world.daemon = first
    world.run(world.now + 45.0)  # a version that only the other one has committed fails here, in time
    assert_versions_go_on(world)
    world.run_until_quiet()
    assert_all_serve(world, within=8.0)


# ----------------------------------------------------------------------------------------------------------- rollbacks
def rolls_back(world: World) -> None:
    """The operator wants the version before."""
    daemon = world.daemon
    assert daemon is not None
    daemon.post(RollbackAsked(daemon.next_id(), "operator", "", None))


@pytest.mark.parametrize("phase", ["", "deciding", "switching", "left", "recording"])
def test_a_rollback_whatever_becomes_of_the_daemon(phase: str) -> None:
    """All serve the one version or all the other, without a trainer; asked again, the one before."""
    world = World(29, engines=3, lands=everybody("flip"))
    world.run(6.0)
    world.run_until_quiet()
    world.job.die()
    world.run(world.now + 5.0)
    before, last = world.judge.committed[-2:]
    if phase:
        world.when(begins("flip", phase), lambda: world.kill_daemon(1.0))
    rolls_back(world)
    world.run(world.now + 15.0)
    assert_all_serve(world, within=5.0)
    assert world.judge.committed[-1] in (before, last)
    assert phase or world.judge.committed[-1] == before
    if world.judge.committed[-1] == last:
        rolls_back(world)
        world.run(world.now + 5.0)
    assert world.judge.committed[-1] == before
    assert_all_serve(world, within=1.0)
    served = {worker.standby for server in world.servers.values() for worker in server.workers}
    assert served == {last}, "and back again, if need be"


def test_versions_go_on_after_a_rollback() -> None:
    world = World(30, engines=2, lands=everybody("flip"))
    world.run(6.0)
    world.when(sent(Outcome), lambda: rolls_back(world))  # between two rounds: later ones begin with the conversion
    assert_versions_go_on(world)
    assert len(set(world.judge.committed)) < len(world.judge.committed), "some version was committed twice"


@pytest.mark.parametrize("mode", ["copy", "flip"])
def test_a_trainer_that_wakes_up_late_writes_into_nothing_that_is_served(mode: Lands) -> None:
    """Stopped in the middle of a grant: all serve on with what they have, whatever it writes when it goes on."""
    world = World(31, engines=2, trainers=1, lands=everybody(mode))
    world.run(6.0)
    first = world.job
    world.when(begins(mode, "writing"), lambda: world.later(0.03, first.ranks[0].stop))
    world.run(20.0)
    assert first.ranks[0].open
    assert_all_serve(world, within=1.0)
    first.ranks[0].thaw()
    world.run(24.0)
    assert all(server.serves for server in world.servers.values())
    assert_versions_go_on(world)
