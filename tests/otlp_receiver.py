"""A collector: an HTTP server that takes OTLP's protobuf, as OpenTelemetry's own do."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Received:
    """A span as it came, with its process's resource; ids in hex."""

    name: str
    trace: str
    span: str
    parent: str
    start: int
    end: int
    failed: str
    attributes: dict[str, object]
    resource: dict[str, object]


class Collector:
    """``endpoint`` is what exporters are told; ``spans`` what has come."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Received] = []
        self._more = asyncio.Event()

    async def until(self, holds: Callable[[list[Received]], bool], seconds: float = 90.0) -> list[Received]:
        async with asyncio.timeout(seconds):
            while not holds(self.spans):
                self._more.clear()
                await self._more.wait()
        return self.spans

    async def take(self, request: web.Request) -> web.Response:
        assert request.headers["Content-Type"] == "application/x-protobuf"
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip" and body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {each.key: each.value.string_value for each in group.resource.attributes}
            for scope in group.scope_spans:
                for span in scope.spans:
                    values = {
                        each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value")
                        for each in span.attributes
                    }
                    failed = span.status.message if span.status.code == 2 else ""
                    self.spans.append(
                        Received(
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            failed,
                            values,
                            about,
                        )
                    )
        self._more.set()
        answer = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=answer, content_type="application/x-protobuf")


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector, app = Collector(), web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        collector.endpoint = f"http://127.0.0.1:{port}/v1/traces"
        yield collector
    finally:
        await runner.cleanup()
