"""Whatever bytes come, each parser accepts them or says why not: no other error, no crash, no hang.

``FUZZ_SECONDS`` is the time for each (``make fuzz``: a minute). A failure shows the bytes, as few as can be: mend the
parser, and keep them as a file of ``corpus/NAME/``, which is fed first.
"""

from pathlib import Path

import pytest
from fuzzing import SECONDS, corpus, fuzz
from targets import TARGETS, Target


@pytest.mark.timeout(120 + 2 * SECONDS)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_comes_is_taken_or_refused(target: Target, tmp_path: Path) -> None:
    feed = target.feed(tmp_path)
    known = corpus(target.name)
    for data in known:
        feed(data)
    assert [data for data in target.seeds if not feed(data)] == [], "what it is made of is right"
    fuzz(feed, [*target.seeds, *known], SECONDS)
