"""What Prometheus reads at ``/metrics`` (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from veneer.server.bases import Bases
from veneer.server.tinker.service import Tinker
from veneer.server.worker import Worker
from veneer.types import Engine, ForwardBackwardOutput, Sample

disable_created_metrics()  # a second series for every series, which nobody asked for
METHODS = {"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters of one application, in a registry of its own."""

    def __init__(self, bases: Bases, worker: Worker, tinker: Tinker) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("veneer_requests", "Requests answered.", ("method", "route", "status"), registry=registry)
        self.seconds = Histogram(
            "veneer_request_seconds", "From a request's first byte to its answer's last.", ("route",), buckets=SECONDS, registry=registry
        )
        self.sampled = Counter("veneer_tokens_sampled", "Tokens drawn.", ("base",), registry=registry)
        self.trained = Counter("veneer_tokens_trained", "Tokens of forward and forward_backward passes.", ("base",), registry=registry)
        registry.register(_Now(bases, worker, tinker))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._names = {base.engine: base.name for base in bases.served}
        worker.on_answer.append(self._count_tokens)

    def note(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. ``route``: a template, as each value is a series of its own."""
        self.requests.labels(method if method in METHODS else "other", route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def _count_tokens(self, engine: Engine, result: object) -> None:
        if isinstance(result, ForwardBackwardOutput):
            self.trained.labels(self._names[engine]).inc(sum(len(logprobs) for logprobs in result.logprobs_D))
        elif isinstance(result, list):
            self.sampled.labels(self._names[engine]).inc(sum(len(sample.tokens) for sample in result if isinstance(sample, Sample)))


class _Now(Collector):
    """What is true at the moment of asking."""

    def __init__(self, bases: Bases, worker: Worker, tinker: Tinker) -> None:
        self.bases, self.worker, self.tinker = bases, worker, tinker

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("veneer_promises_open", "Operations accepted and not answered.", self.tinker.promises.open())
        yield GaugeMetricFamily("veneer_engine_queue", "Requests that the engines have and have not answered.", self.worker.waiting)
        runs = GaugeMetricFamily("veneer_runs_loaded", "Training runs in memory.", labels=("base",))
        adapters = GaugeMetricFamily("veneer_adapters_loaded", "Adapters in memory that only serve.", labels=("base",))
        sizes = GaugeMetricFamily("veneer_adapter_bytes", "Memory of adapters.", labels=("base", "use"))
        info = InfoMetricFamily("veneer_base", "The bases that are held.")
        for base in self.bases.served:
            runs.add_metric((base.name,), self.tinker.loaded(base))
            adapters.add_metric((base.name,), len(base.shelf))
            sizes.add_metric((base.name, "serving"), base.shelf.size)
            sizes.add_metric((base.name, "training"), self.tinker.size_on(base))
            info.add_metric((), {"base": base.name, "digest": base.engine.base_digest, "dtype": base.engine.dtype})
        yield from (runs, adapters, sizes, info)


def add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
