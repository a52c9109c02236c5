"""What agents share that publish: errors of one kind, what became of each version, and a start that fails cleanly."""

import re
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_fleet import LAYER, SHAPES, TRAINER, Target, made_slots, planned
from weightsync.agents.trainer.errors import NonFiniteWeights, ReplicaFailed
from weightsync.agents.trainer.options import trainer_settings
from weightsync.agents.trainer.publication import BusyError, Publication, PublishError
from weightsync.agents.trainer.publisher import Publisher, source_of, staged_bytes_of
from weightsync.agents.trainer.replicas import ALONE
from weightsync.agents.trainer.slots import finite
from weightsync.agents.trainer.thread_side import TrainerSide
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.protocol.token import TokenError

NOBODY = "ws://127.0.0.1:9/agents"


class Bare(Publisher):
    """Nothing but what all share."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ALONE, "refuse", 5.0)
        with self._starting(lambda: trainer_settings(NOBODY, folder / "token", "r", folder)):
            pass


@pytest.fixture
def bare(tmp_path: Path) -> Bare:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    return Bare(tmp_path)


def test_a_start_reads_the_token_and_agrees_on_a_generation(bare: Bare, tmp_path: Path) -> None:
    assert bare.generation != Bare(tmp_path).generation
    (tmp_path / "token").unlink()
    with pytest.raises(TokenError):
        Bare(tmp_path)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ReplicaFailed(2, "BusyError: version 3"), BusyError, "step 4 was not published: rank 2: BusyError: version 3"),
        (ReplicaFailed(2, "OSError: disk"), PublishError, "step 4 was not published: rank 2: OSError: disk"),
        (KeyError("w"), PublishError, "step 4 was not published: rank 0: KeyError: 'w'"),
        (PublishError("as it is"), PublishError, "^as it is$"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "^now$"),
    ],
)
def test_whatever_a_rank_meets_is_a_failed_publish_but_not_an_interrupt(
    error: BaseException, kind: type[BaseException], words: str, bare: Bare
) -> None:
    with pytest.raises(kind, match=words) as caught, bare._publishing(4):
        raise error
    assert type(caught.value) is kind


def test_a_step_that_failed_is_counted_until_it_is_committed(bare: Bare) -> None:
    def ended(number: int | None) -> Publication:
        outcome: Future[int] = Future()
        if number is None:
            outcome.set_exception(PublishError("no"))
        else:
            outcome.set_result(number)
        return Publication(Version(1, 7), outcome)

    for times in (1, 2):
        bare._book(ended(None))
        assert (bare._failures, bare._committed) == ({7: times}, set())
    bare._book(ended(3))
    assert (bare._failures, bare._committed) == ({}, {7})


def test_slots_with_edges_are_read_once(bare: Bare, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of what is sent looks for NaN as well; a second look is for a version that has any."""
    state = weights.state(SHAPES)
    slots = made_slots(state, 0)
    side = TrainerSide(SimpleNamespace(), source_of(slots, TRAINER, 1), staged_bytes_of(slots))  # type: ignore[arg-type]
    side._shares.replan(planned(slots, [Target.of("a", rank, 0) for rank in range(2)])[1])
    side._fingerprint = "edges"
    bare._agent = SimpleNamespace(side=side)  # type: ignore[assignment]
    looks: list[int] = []
    fine = finite._fine
    monkeypatch.setattr(finite, "_fine", lambda runs: looks.append(len(runs)) or fine(runs))

    def publish(step: int) -> tuple[float, float]:
        return bare._filled(Version(1, step), slots, lambda: slots.convert(state))

    digest, rest = publish(1)
    assert digest > 0 < rest
    assert looks == [0], "no run of memory is left to look at"
    name = LAYER + "mlp.down_proj.weight"
    state[name][3, 100] = torch.nan
    with pytest.raises(NonFiniteWeights, match=re.escape(f"{name} (1 of {64 * 128} values)")):
        publish(2)
    assert looks[1] > 0
    refused = side._read(Version(1, 2)).digests
    state[name][3, 100] = 1.0
    publish(2)
    assert looks[2:] == [0]
    assert side._read(Version(1, 2)).digests != refused, "other weights of the same version have another digest"


def test_a_daemon_that_does_not_answer_leaves_no_agent_behind(bare: Bare) -> None:
    with bare:
        with pytest.raises(TimeoutError, match="no Welcome"):
            bare._join(0, 1, None, 0.2)
        assert bare._agent is None
        assert not [each for each in threading.enumerate() if each.name == "weightsync trainer/0"]
    assert bare._take_together(5) == 0, "a rank without an agent has nothing to reserve"
