"""Contexts are W3C's, the same for whoever names the same, and different for what differs."""

import msgspec
import pytest
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.protocol.traces.context import TraceContext, child, ids, of_rank, of_version

ROOT = of_version("glm", Version(7, 42))


def test_a_version_is_one_trace_whoever_names_it() -> None:
    assert of_version("glm", Version(7, 42), 0) == ROOT
    others = [of_version("glm", Version(7, 43)), of_version("glm", Version(8, 42)), of_version("glm5", Version(7, 42)),
              of_version("glm", Version(7, 42), 1)]  # fmt: skip
    assert len({ids(context)[0] for context in (ROOT, *others)}) == 5


def test_what_is_done_for_it_is_in_its_trace_and_has_a_span_of_its_own() -> None:
    contexts = [ROOT, child(ROOT, "round 1.1"), child(ROOT, "round 1.2"), child(child(ROOT, "round 1.1"), "write")]
    assert len({ids(context)[0] for context in contexts}) == 1
    assert len({ids(context)[1] for context in contexts}) == 4
    assert child("", "round 1.1") == "", "without a trace there is none"


def test_the_first_rank_is_the_root_and_the_others_are_below_it() -> None:
    assert of_rank(ROOT, 0) == ROOT
    assert len({of_rank(ROOT, rank) for rank in range(64)}) == 64


@pytest.mark.parametrize("context", ["", ROOT, child(ROOT, "x"), "00-" + "0" * 31 + "1-" + "0" * 15 + "1-01"])
def test_they_travel(context: str) -> None:
    assert msgspec.convert(context, TraceContext) == context


@pytest.mark.parametrize("context", ["00", ROOT + " ", ROOT + "\n", ROOT.upper(), "01" + ROOT[2:], ROOT[:-1] + "9"])
def test_and_nothing_else_does(context: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(context, TraceContext)
