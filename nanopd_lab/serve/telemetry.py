"""What Prometheus reads at /metrics: counted as requests end, and looked up in the cluster as it asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.serve.bridge import Bridge

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Telemetry:
    """Metrics of one server, in a registry of their own.

    Latencies are the cluster's, from submission; a request that fails is counted and has none.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "nanopd_requests", "Samples that have ended", ["reason", "route"], registry=self.registry
        )
        self._refused = Counter(
            "nanopd_requests_refused", "Requests that were not taken", ["status"], registry=self.registry
        )
        self._prompt_tokens = Counter("nanopd_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self._cached_tokens = Counter(
            "nanopd_cached_tokens", "Tokens of prompts whose KV their prefill found", registry=self.registry
        )
        self._moved_tokens = Counter(
            "nanopd_transferred_tokens",
            "Tokens whose KV went from one worker to another",
            registry=self.registry,
        )
        self._generated = Counter("nanopd_generation_tokens", "Tokens of outputs", registry=self.registry)
        self._ttft = Histogram(
            "nanopd_time_to_first_token_seconds", "From submission", buckets=SECONDS, registry=self.registry
        )
        self._tpot = Histogram(
            "nanopd_time_per_output_token_seconds",
            "Behind the first",
            buckets=PER_TOKEN,
            registry=self.registry,
        )
        self._e2e = Histogram(
            "nanopd_e2e_request_latency_seconds", "To the last token", buckets=SECONDS, registry=self.registry
        )

    def watch(self, bridge: Bridge) -> None:
        """Ask this bridge how many requests run, and its cluster what the workers do, whenever somebody reads."""
        self.registry.register(_Live(bridge))

    def ended(self, output: ClusterOutput) -> None:
        """Count a request whose accounts are complete."""
        self._prompt_tokens.inc(len(output.prompt_token_ids))
        self._cached_tokens.inc(output.num_cached_prompt_tokens)
        for sample, path in zip(output.outputs, output.paths, strict=True):
            route = (
                "none" if path.route is None else "collocated" if path.route.collocated else "disaggregated"
            )
            self._requests.labels(sample.finish_reason or "abort", route).inc()
            self._moved_tokens.inc(path.transferred_tokens)
            self._generated.inc(len(sample.token_ids))
            times = sample.token_times
            if sample.error is None and len(times) > 1:
                self._tpot.observe((times[-1] - times[0]) / (len(times) - 1))
        metrics = output.metrics
        if metrics.ttft is not None:
            self._ttft.observe(metrics.ttft)
        if metrics.e2e is not None and not any(sample.error for sample in output.outputs):
            self._e2e.observe(metrics.e2e)

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error at once."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Live:
    """Gauges that are looked up when somebody asks."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("nanopd_requests_running", "Requests that have come and not ended")
        running.add_metric([], self._bridge.running)
        yield running
        prefilling = GaugeMetricFamily(
            "nanopd_worker_prefilling", "Jobs whose prompt it computes", labels=["worker", "role"]
        )
        decoding = GaugeMetricFamily(
            "nanopd_worker_decoding", "Jobs whose output it computes", labels=["worker", "role"]
        )
        usage = GaugeMetricFamily(
            "nanopd_worker_kv_usage", "Part of its KV blocks in use", labels=["worker", "role"]
        )
        for view in self._bridge.cluster.workers():
            labels = [view.name, view.role.value]
            prefilling.add_metric(labels, view.prefilling)
            decoding.add_metric(labels, view.decoding)
            if view.num_blocks:
                usage.add_metric(labels, 1 - view.blocks_free / view.num_blocks)
        yield from (prefilling, decoding, usage)
