"""What a server counts, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_scale.errors import MissingExtraError

if TYPE_CHECKING:
    from llava_scale.serving.worker import Worker

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class ServerMetrics:
    """Counters and gauges in a registry of their own.

    Args:
        worker: Whose batch is watched.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self, worker: Worker) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError:
            raise MissingExtraError("prometheus-client", "serve") from None
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "llava_scale", "registry": self.registry}
        self.requests = Counter("requests", "Requests by HTTP status; 499: the client left.", ["status"], **common)
        self.tokens = Counter("tokens", "Tokens read (prompt) and written (answer).", ["kind"], **common)
        self.seconds = Histogram("request_seconds", "Whole time of a request.", buckets=_SECONDS, **common)
        self.first_token = Histogram("first_token_seconds", "Time to the first token.", buckets=_SECONDS, **common)
        Gauge("running", "Answers in the batch.", **common).set_function(lambda: worker.num_running)
        Gauge("waiting", "Answers that wait for the batch.", **common).set_function(lambda: worker.num_waiting)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        from prometheus_client import generate_latest

        page: bytes = generate_latest(self.registry)
        return page
