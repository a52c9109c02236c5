"""Clients that stream from a server while its weights change, and what they may be told.

A muted version says token 0 whatever the keys and values are, and no mixture of it with another does. An answer across
the switch to one is the tokens of the other up to some point, and token 0 from there on.
"""

import threading

from serving import VllmServer


class Streams:
    """Clients that stream one answer after the other while something happens; ``said`` has those of each client.

    Each begins when the one before has heard its share of an answer, so that they are not all between two answers at
    the same moment.
    """

    def __init__(self, server: VllmServer, prompts: list[tuple[int, ...]], tokens: int) -> None:
        self.said: list[list[list[int]]] = [[] for _ in prompts]
        self.errors: list[Exception] = []
        self._stop, self._server, self._tokens = threading.Event(), server, tokens
        self._under_way = [threading.Event() for _ in prompts]
        self._threads = [
            threading.Thread(target=self._hear, args=(prompt, said, event), daemon=True)
            for prompt, said, event in zip(prompts, self.said, self._under_way, strict=True)
        ]
        self._share = tokens // (len(prompts) + 1)

    def __enter__(self) -> "Streams":
        for thread, event in zip(self._threads, self._under_way, strict=True):
            thread.start()
            assert event.wait(60), self.errors
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _hear(self, prompt: tuple[int, ...], said: list[list[int]], under_way: threading.Event) -> None:
        try:
            while not self._stop.is_set():
                said.append([])
                for chunk in self._server.stream(prompt, self._tokens):
                    said[-1] += chunk
                    if len(said) > 1 or len(said[-1]) >= self._share:
                        under_way.set()
        except Exception as error:
            self.errors.append(error)


def require_whole_versions(streams: Streams, old: list[int]) -> None:
    """Each answer is ``old`` up to some point and 0 from there on; after its first 0 a client hears nothing else."""
    assert streams.errors == []
    length, crossed = len(old), 0
    for answers in streams.said:
        points = []
        for tokens in answers:
            assert len(tokens) == length, "a token was lost"
            points.append(tokens.index(0) if 0 in tokens else length)
            assert tokens == old[: points[-1]] + [0] * (length - points[-1])
        new = next((index for index, point in enumerate(points) if point < length), len(points))
        assert points[:new] == [length] * new
        assert points[new + 1 :] == [0] * len(points[new + 1 :])
        crossed += any(0 < point < length for point in points)
    assert crossed, "no stream was under way at the switch"
