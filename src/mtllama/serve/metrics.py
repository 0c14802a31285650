"""The counters of a server, as Prometheus reads them."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from mtllama.serve.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Requests and waiting times, and what the scheduler counts. Each server has its own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Load(scheduler))
        self._requests = Counter("mtllama_requests", "Requests answered", ("route", "status"), registry=self._registry)
        self._seconds = Histogram("mtllama_request_seconds", "From request to answer", ("route",), buckets=SECONDS, registry=self._registry)
        self._first = Histogram("mtllama_first_token_seconds", "From request to first text", buckets=SECONDS, registry=self._registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """The first text of an answer was told."""
        self._first.observe(seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Load(Collector):
    """Reads the scheduler's counts when asked."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def collect(self) -> list[GaugeMetricFamily | CounterMetricFamily]:
        load = self.scheduler.load
        return [
            GaugeMetricFamily("mtllama_running", "Continuations in the batch", self.scheduler.running),
            GaugeMetricFamily("mtllama_waiting", "Prompts that wait", self.scheduler.waiting),
            CounterMetricFamily("mtllama_prompt_tokens", "Tokens of prompts that were read to go on behind", load.prompt_tokens),
            CounterMetricFamily("mtllama_generated_tokens", "Tokens generated", load.generated_tokens),
            CounterMetricFamily("mtllama_scored_tokens", "Tokens of prompts and choices that were read to score", load.scored_tokens),
            CounterMetricFamily("mtllama_cancelled", "Continuations whose client went away", load.cancelled),
        ]
