"""A sink that keeps the spans that it is given."""

from weightsync.orchestrator.protocol.traces.context import Span


class KeptSpans:
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.closed = False

    def __call__(self, span: Span) -> None:
        self.spans.append(span)

    def close(self) -> None:
        self.closed = True
