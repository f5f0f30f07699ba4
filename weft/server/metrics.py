"""Prometheus metrics: under the names that dashboards for vLLM use where the meaning is the same, else under weft's.

Knows steps and seconds; knows nothing of HTTP. A registry of its own, so that several servers fit into one process.
"""

from __future__ import annotations

from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from weft.about import Figures
from weft.turn import Turn

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """All that is counted. Written to by engines' threads, read by any."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._name = ""
        self._seen: dict[Counter, float] = {}
        gauge, counter = self._gauge, self._counter
        self._running = gauge("vllm:num_requests_running", "Completions that have a slot")
        self._waiting = gauge("vllm:num_requests_waiting", "Completions that wait for a slot")
        self._memory = gauge("vllm:kv_cache_usage_perc", "Part of the key/value memory that is taken, 0 to 1")
        self._efficiency = gauge("weft:overlap_efficiency", "Part of the shorter lane's time that was hidden, so far")
        self._prompt = counter("vllm:prompt_tokens", "Tokens of prompts, computed or reused, each once")
        self._output = counter("vllm:generation_tokens", "Tokens of answers")
        self._queries = counter("vllm:prefix_cache_queries", "Tokens of prompts looked up among the prefixes")
        self._hits = counter("vllm:prefix_cache_hits", "Tokens of prompts that were not computed again")
        self._preempted = counter("vllm:num_preemptions", "Completions that had to wait again for memory")
        self._restarts = counter("weft:restarts", "Starts of a new group of workers after one was lost")
        self._batches = counter("weft:batches", "Batches")
        self._run = counter("weft:run_seconds", "Seconds that batches took, of the slowest rank")
        self._compute = counter("weft:compute_seconds", "Seconds that the compute lane was busy")
        self._network = counter("weft:network_seconds", "Seconds that the network lane was busy")
        self._exposed = counter("weft:exposed_communication_seconds", "Seconds of batches beyond their computation")
        self._bytes = counter("weft:wire_bytes", "Bytes that ranks sent to each other")
        self._over = counter("vllm:request_success", "Requests that ended", ("finished_reason",))
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From the request's arrival", FIRST)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between tokens of a completion", BETWEEN)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token", WHOLE)
        self._hidden = self._possible = 0.0
        self._lock = Lock()

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model_name",), registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)

    def named(self, model: str) -> None:
        """The label that all get; before anything is counted."""
        self._name = model

    def turn(self, turn: Turn) -> None:
        """One batch."""
        result = turn.result
        self._add(self._batches, 1)
        self._add(self._run, turn.run)
        self._add(self._compute, result.compute)
        self._add(self._network, result.network)
        self._add(self._exposed, max(0.0, result.seconds - result.compute))
        self._add(self._bytes, sum(result.bytes_sent))
        if result.network > 0:
            with self._lock:
                self._hidden += max(0.0, result.compute + result.network - result.seconds)
                self._possible += min(result.compute, result.network)
                self._efficiency.labels(self._name).set(self._hidden / self._possible)

    def look(self, figures: Figures) -> None:
        """What the engine itself keeps count of."""
        self._running.labels(self._name).set(figures.running)
        self._waiting.labels(self._name).set(figures.waiting)
        self._memory.labels(self._name).set(figures.memory)
        self._up_to(self._queries, figures.looked_up)
        self._up_to(self._hits, figures.reused)
        self._up_to(self._preempted, figures.preempted)
        self._up_to(self._restarts, figures.restarts)

    def prompt(self, tokens: int) -> None:
        """Of one request, computed to its end."""
        self._add(self._prompt, tokens)

    def first_token(self, seconds: float) -> None:
        """Of one request."""
        self._first.labels(self._name).observe(seconds)

    def tokens(self, count: int) -> None:
        """Of answers."""
        self._add(self._output, count)

    def next_token(self, seconds: float) -> None:
        """Of one completion."""
        self._between.labels(self._name).observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """One request, by its end or by its client."""
        self._over.labels(self._name, reason).inc()
        self._whole.labels(self._name).observe(seconds)

    def text(self, figures: Figures | None) -> bytes:
        """In Prometheus's exposition format."""
        if figures is not None:
            self.look(figures)
        return generate_latest(self.registry)

    def _add(self, counter: Counter, amount: float) -> None:
        counter.labels(self._name).inc(amount)

    def _up_to(self, counter: Counter, value: float) -> None:
        """Raises a counter to what was counted elsewhere."""
        self._add(counter, max(0.0, value - self._seen.get(counter, 0.0)))
        self._seen[counter] = value
