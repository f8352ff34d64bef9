"""OpenTelemetry traces, for those who ask for them: one span per request, from its closed record.

The packages are the extra `stepflash[otel]` and are imported only when an endpoint is given. A `traceparent`
header makes the span part of the caller's trace. Attributes are those of the semantic conventions for
generative AI; texts are never among them.
"""

from __future__ import annotations

from collections.abc import Callable

from stepflash.errors import ConfigError
from stepflash.server.request_records import RequestRecord


def span_exporter(endpoint: str) -> Callable[[RequestRecord], None]:
    """Sends a span for every closed request to an OTLP endpoint over HTTP, in the background.

    Raises:
        ConfigError: the packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"traces need OpenTelemetry ({error}): pip install 'stepflash[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "stepflash"}))
    url = endpoint if endpoint.rstrip("/").endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return spans_to(provider)


def spans_to(provider: object) -> Callable[[RequestRecord], None]:
    """The same for any tracer provider."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    assert isinstance(provider, TracerProvider)
    tracer = provider.get_tracer("stepflash")
    propagator = TraceContextTextMapPropagator()

    def export(record: RequestRecord) -> None:
        usage = record.usage
        attributes: dict[str, str | int | float] = {
            "http.request.method": record.method,
            "http.route": record.route,
            "http.response.status_code": record.status,
            "stepflash.request_id": record.request_id,
        }
        if record.answers:
            attributes |= {
                "gen_ai.operation.name": "chat",
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "stepflash.cached_tokens": usage.cached_tokens,
                "stepflash.accepted_draft_tokens": usage.accepted_draft_tokens,
            }
            if (first := record.answers[0].first_token_seconds) is not None:
                attributes["gen_ai.server.time_to_first_token"] = first
        span = tracer.start_span(
            f"{record.method} {record.route}",
            context=propagator.extract(dict(record.headers)),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=record.started_ns,
        )
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(record.started_ns + int(record.seconds * 1e9))

    return export
