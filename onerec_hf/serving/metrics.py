"""What a service counts, for Prometheus, and the lines it logs."""

import json
import logging
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

logger = logging.getLogger("onerec_hf.serving")

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Of one application: several in one process do not share their counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("onerec_requests", "Requests by path and status.", ["path", "status"], **own)
        self.seconds = Histogram(
            "onerec_request_seconds", "From the first byte to the last.", ["path"], buckets=_SECONDS, **own
        )
        self.refused = Counter("onerec_refused", "Requests that were not answered, by reason.", ["code"], **own)
        self.waited = Histogram("onerec_queue_seconds", "Time in the queue.", buckets=_SECONDS, **own)
        self.searched = Histogram("onerec_search_seconds", "Time of a search.", buckets=_SECONDS, **own)
        self.batch_rows = Histogram("onerec_batch_rows", "Histories per search.", buckets=_ROWS, **own)
        self.queued = Gauge("onerec_queued_rows", "Histories that wait.", **own)
        self.items = Gauge("onerec_catalogue_items", "Items of the current version.", **own)
        self.version = Gauge(
            "onerec_version", "1 for the current version.", ["version", "model", "catalogue", "fingerprint"], **own
        )
        self.swaps = Counter(
            "onerec_swaps", "Changes of the version, by kind and outcome.", ["kind", "outcome"], **own
        )

    def text(self) -> bytes:
        """As `GET /metrics` sends it."""
        return generate_latest(self.registry)


def log(event: str, **values: Any) -> None:
    """
    One line of JSON. Who calls it passes counts, names and times, and neither histories nor recommendations nor what a
    client sent.
    """
    if logger.isEnabledFor(logging.INFO):
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        logger.info(json.dumps({"time": stamp, "event": event, **values}))


__all__ = ["Metrics", "log", "logger"]
