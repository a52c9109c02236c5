"""What a monitor sees of a running fleet that has pushed versions: its metrics, and what agents say of themselves."""

import importlib.util
from pathlib import Path

from fleet import Fleet
from prometheus_client.parser import text_string_to_metric_families

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "site" / "reference_pages.py"

Series = dict[str, dict[tuple[str, ...], float]]
"""Values by the labels' values in the order of the labels' names, by the name of the sample without its prefix."""


def described() -> dict[str, set[str]]:
    """Every family that the reference page has, with the names of its labels."""
    spec = importlib.util.spec_from_file_location("reference_pages", REFERENCE)
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return {family.name: set(labels) for family, labels in page.families()}


def scraped(whole: Fleet) -> Series:
    """One scrape, of exactly the families and labels that are described."""
    families = list(text_string_to_metric_families(whole.ask("/metrics")))
    known = described()
    assert {family.name for family in families} == known.keys()
    series: Series = {}
    for family in families:
        for sample in family.samples:
            assert set(sample.labels) - {"le"} <= known[family.name], sample
            at = tuple(value for _, value in sorted(sample.labels.items()))
            series.setdefault(sample.name.removeprefix("weightsync_"), {})[at] = sample.value
    return series


def require_metrics(whole: Fleet, rounds: int, step: int, trainers: int, ranks: int) -> None:
    """After so many committed rounds and nothing else, the last of them of ``step``, with one engine of ``ranks``."""
    series, status = scraped(whole), whole.status()
    ended = {labels: count for labels, count in series["rounds_total"].items() if count}
    assert ended == {("", "committed"): rounds}, ended
    moved = sum(row["bytes"] for row in status["rounds"])
    assert moved > 0
    assert series["moved_bytes_total"] == {(): moved}
    assert sum(series["link_moved_bytes_total"].values()) == moved
    assert series["committed_sequence"] == {(): rounds}
    assert series["committed_step"] == {(): step}
    [(labels, serving)] = series["engine_serving_committed"].items()
    assert (labels[0], serving) == ("engine", 1)
    assert series["engine_step"] == {("engine",): step}
    assert series["engine_state"] == {("engine", "serving"): 1}
    assert sum(count for (role, _), count in series["agents"].items() if role == "trainer") == trainers
    assert series["agents"]["inference", ""] == ranks
    assert series["agents_connected_total"] == {("trainer",): trainers, ("inference",): ranks}
    assert series["problems"]["critical",] == 0, status["problems"]
    assert series["round_seconds_count"]["total",] == rounds
    assert 0 < series["round_seconds_sum"]["total",] < 600
    assert series["wire_gigabytes_per_second_count"] == {(): rounds}
    assert series["plans_total"]["made",] >= 1
    assert sum(series["engine_calls_total"].values()) > 0
    assert series["journal_append_seconds_count"][()] > rounds
    assert series["journal_bytes"][()] > 0
    assert series["loop_lag_seconds_count"][()] > 0
    assert 0 < series["process_cpu_seconds_total"][()] < 600
    assert sum(len(values) for values in series.values()) < 600


def require_surroundings(whole: Fleet) -> None:
    """Trainer and engine run with a preset UCX_TLS and say so, which is worth knowing and nothing wrong."""
    status = whole.status()
    [told] = [finding for finding in status["findings"] if finding["check"] == "UCX_TLS"]
    assert (told["level"], told["fix"]) == ("note", "unset UCX_TLS")
    assert {"trainer/0", "engine/0"} <= set(told["members"])
    assert not [problem for problem in status["problems"] if "UCX_TLS" in problem["what"]]
    said = whole.command("status", "--config", str(whole.config))
    assert "UCX_TLS: UCX_TLS=tcp,self,sm: only these transports are used" in " ".join(said.split())
