"""What the environment of an engine says about how versions land."""

import pytest
from weightsync.agents.inference.modes import ModeRefused, wanted_mode


def test_without_a_word_it_is_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHTSYNC_MODE", raising=False)
    assert wanted_mode() == "auto"


@pytest.mark.parametrize("mode", ["auto", "flip", "copy", "live"])
def test_each_mode_is_taken_by_its_name(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_MODE", mode)
    assert wanted_mode() == mode


def test_what_is_no_mode_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_MODE", "Flip")
    with pytest.raises(ModeRefused, match="'Flip'; it may be one of auto, flip, copy, live"):
        wanted_mode()
