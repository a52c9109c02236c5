"""Contexts are W3C's, the same for whoever names the same, and different for what differs."""

import msgspec
import pytest
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.protocol.traces.context import TraceContext, child, ids, is_context, of_rank, of_version

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


def test_a_context_fits_what_it_travels_in() -> None:
    assert msgspec.convert(ROOT, TraceContext) == ROOT
    assert is_context(ROOT)
    assert is_context(child(ROOT, "x"))


@pytest.mark.parametrize("said", ["", "00", ROOT + " ", ROOT + "\n", ROOT.upper(), "01" + ROOT[2:], "x" * 55])
def test_what_is_none_has_nothing_below_it(said: str) -> None:
    assert not is_context(said)
    assert child(said, "round 1.1") == ""
