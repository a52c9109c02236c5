"""Stock configurations of transformers, one of each kind of checkpoint, judged by a fresh engine at TP 1 and 2.

What is done with each stands in ``tests/families/judge.py``; ``make families`` does it with all of them.
"""

from functools import cache
from pathlib import Path

import pytest
from families.configs import DOZEN
from families.groups import Verdict, verdicts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory):
    """Verdicts at one degree of tensor parallelism, by family; each degree runs once, when a test first asks for it."""

    @cache
    def at(tensor_parallel: int) -> dict[str, Verdict]:
        directory: Path = tmp_path_factory.mktemp("families")
        return {verdict.family: verdict for verdict in verdicts(DOZEN, tensor_parallel, directory)}

    return at


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize("family", DOZEN)
def test_a_written_engine_is_a_fresh_one(judged, family: str, tensor_parallel: int) -> None:
    verdict = judged(tensor_parallel)[family]
    assert verdict == Verdict(family, tensor_parallel, "same")
