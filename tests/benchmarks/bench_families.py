"""Stock configurations of transformers, judged by a fresh engine: JSON lines; ``make families``.

Lines are ``{"figure", "value", "unit", "n", "spread"}``: first one per family and degree of tensor parallelism, whose
value is the outcome (with ``reason`` beside it), then how many families there are of each outcome. A family counts as
``same`` if it is at every degree, as ``wrong`` if it is at any. With ``--document`` nothing is judged: the table of
``docs/models.md`` is written from a file of such lines.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from families.configs import FAMILIES
from families.document import Line, write_page
from families.groups import verdicts

DEGREES = (1, 2)
OUTCOMES = ("same", "refused", "wrong")
"""From good to bad: a family is the worst of what it is at the degrees."""


def figures(lines: Sequence[Line]) -> None:
    worst: dict[str, str] = {}
    for line in lines:
        worst[line.family] = max(worst.get(line.family, "same"), line.outcome, key=OUTCOMES.index)
    counted = Counter(worst.values())
    for outcome in OUTCOMES:
        figure = {"figure": f"families_{outcome}", "value": counted[outcome], "unit": "families", "n": 1, "spread": 0}
        print(json.dumps(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="all, if none is named")
    parser.add_argument("--tp", type=int, nargs="+", default=DEGREES, help="degrees of tensor parallelism")
    parser.add_argument("--logs", type=Path, help="an empty directory for the ranks' logs; default: a temporary one")
    parser.add_argument("--document", type=Path, metavar="JSONL", help="write docs/models.md from this file and end")
    options = parser.parse_args()
    if options.document:
        write_page(options.document)
        return
    with tempfile.TemporaryDirectory() as temporary:
        lines = []
        for degree in options.tp:
            for verdict in verdicts(options.families, degree, options.logs or Path(temporary)):
                lines.append(Line(verdict.family, degree, verdict.outcome, verdict.reason))
                print(lines[-1].json(), flush=True)
                print(f"{verdict.family} × {degree}: {verdict.outcome} {verdict.reason}", file=sys.stderr)
    figures(lines)


if __name__ == "__main__":
    main()
