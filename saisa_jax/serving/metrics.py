"""What Prometheus reads: the engine's counts, and how long requests took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from saisa_jax.serving.questions import Answers

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Metrics of one server.

    Attributes:
      requests: ended ones, by status (499: the client left).
      first_token, whole: histograms of seconds, from a request's body to its first token and to its end.
    """

    def __init__(self, engine: Answers) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)  # pyright: ignore[reportArgumentType]  (anything that collects is one)
        self.requests = Counter("saisa_jax_requests", "ended requests", ["status"], registry=self._registry)
        self.first_token = self._histogram("first_token_seconds", "from the request to the first token")
        self.whole = self._histogram("request_seconds", "from the request to the end of the answer")

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"saisa_jax_{name}", about, buckets=SECONDS, registry=self._registry)

    def collect(self) -> Iterator[Any]:
        """The engine's counts, read when they are asked for."""
        engine, cache = self._engine, self._engine.model.image_cache
        for name, about, value in (
            ("queue_length", "questions without a row", engine.waiting),
            ("rows_busy", "rows in use", engine.busy),
            ("rows", "rows", engine.count),
            ("image_cache_images", "pictures whose keys and values are kept", len(cache)),
            ("image_cache_bytes", "bytes of them", cache.nbytes),
        ):
            yield GaugeMetricFamily(f"saisa_jax_{name}", about, value)
        for name, about, value in (
            *engine.counters,
            ("image_cache_hits", "pictures that were found", cache.hits),
            ("image_cache_misses", "pictures that had to be encoded", cache.misses),
        ):
            yield CounterMetricFamily(f"saisa_jax_{name}", about, value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
