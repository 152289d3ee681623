"""The server's Prometheus metrics; one registry per app, so that two apps in one process do not share counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Everything that ``/metrics`` shows. Names are the documentation: ``gradhelm_<noun>_<unit>``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "gradhelm_http_requests", "Answered requests.", ["method", "route", "status"], registry=r
        )
        self.request_seconds = Histogram(
            "gradhelm_http_request_seconds", "Time to the end of the answer.", ["route"], buckets=_SECONDS, registry=r
        )
        self.in_flight = Gauge("gradhelm_http_requests_in_flight", "Requests being answered.", registry=r)
        self.auth_failures = Counter("gradhelm_auth_failures", "Refused keys and scopes.", ["reason"], registry=r)
        self.upload_bytes = Counter("gradhelm_upload_bytes", "Bytes of accepted uploads.", registry=r)
        self.jobs = Gauge("gradhelm_jobs", "Jobs by status, counted at the scrape.", ["status"], registry=r)
        self.prompt_tokens = Counter("gradhelm_prompt_tokens", "Prompt tokens of finished choices.", registry=r)
        self.generated_tokens = Counter("gradhelm_generated_tokens", "Generated tokens.", registry=r)
        self.generations = Counter(
            "gradhelm_generations",
            "Generation requests by outcome: finished, failed, or left by their client.",
            ["outcome"],
            registry=r,
        )
        self.first_token_seconds = Histogram(
            "gradhelm_first_token_seconds", "Time from request to first token.", buckets=_SECONDS, registry=r
        )
        self.generating = Gauge("gradhelm_generations_in_flight", "Generation requests in flight.", registry=r)
        self.steered = Counter("gradhelm_steered_choices", "Choices generated with a steering vector.", registry=r)
        self.streams = Gauge("gradhelm_event_streams_open", "Open event and log streams.", registry=r)
        self.disk_free = Gauge("gradhelm_disk_free_bytes", "Free space in the data folder.", registry=r)
