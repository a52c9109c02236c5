"""The table of ``docs/models.md``, made from the lines that ``make families`` printed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from families.configs import FAMILIES

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"


@dataclass(frozen=True, slots=True)
class Line:
    """What one line says of a family at one degree. ``reason`` is empty for ``same``."""

    family: str
    tensor_parallel: int
    outcome: str
    reason: str

    def json(self) -> str:
        """The line, in the form of all figures: ``value`` is the outcome."""
        figure = f"family_{self.family}_tp{self.tensor_parallel}"
        return json.dumps(
            {"figure": figure, "value": self.outcome, "unit": "outcome", "n": 1, "spread": 0} | asdict(self)
        )


def read(file: Path) -> list[Line]:
    """The lines of families in ``file``."""
    objects = (json.loads(line) for line in file.read_text().splitlines())
    fields = tuple(Line.__dataclass_fields__)
    return [Line(*(entry[name] for name in fields)) for entry in objects if "family" in entry]


def table(lines: Sequence[Line]) -> str:
    """The families in the order of their configurations, then why some were refused."""
    return "".join(f"{row}\n" for row in [*_outcomes(lines), "", *_reasons(lines)])


def write_page(file: Path) -> None:
    """Put the table of ``file`` between the marks of the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(read(file))}\n{END}{rest.split(END)[1]}")


def _outcomes(lines: Sequence[Line]) -> Iterator[str]:
    degrees = sorted({line.tensor_parallel for line in lines})
    yield f"| configuration | `model_type` | what is particular | {' | '.join(f'TP {n}' for n in degrees)} |"
    yield "|---|---|---|" + "---|" * len(degrees)
    for name, family in FAMILIES.items():
        found = {line.tensor_parallel: line.outcome for line in lines if line.family == name}
        if found:
            outcomes = " | ".join(found.get(degree, "") for degree in degrees)
            yield f"| {name} | {family.model_type} | {family.kind} | {outcomes} |"


def _reasons(lines: Sequence[Line]) -> Iterator[str]:
    yield "| not the same | who says so, and the words |"
    yield "|---|---|"
    for name in FAMILIES:
        reasons: dict[str, list[str]] = {}
        for line in lines:
            if line.family == name and line.outcome != "same":
                reasons.setdefault(line.reason, []).append(f"TP {line.tensor_parallel}")
        for reason, degrees in reasons.items():
            yield f"| {name}, {' and '.join(degrees)} | {reason.replace('|', '/').replace('<', '&lt;')} |"
