"""What a service takes from one client and from all of them, and how long anybody waits."""

from dataclasses import dataclass, field, fields


@dataclass
class Limits:
    """
    Limits of a service; past them a client gets 408, 413, 422, 429 or 503 with a reason, and never waits for ever.

    Args:
        max_rows (`int`, defaults to 32): Histories that are searched together, of several requests; 1: each request by
            itself. A request with more of them is searched alone.
        max_wait_ms (`float`, defaults to 2.0): Milliseconds that a request waits for others to be searched with, while
            no search runs.
        max_queue (`int`, defaults to 512): Histories of all clients that may wait for a search; a request that does
            not fit gets 429.
        timeout_s (`float`, defaults to 10.0): Seconds for a recommendation, wait and search together; then 503.
        body_timeout_s (`float`, defaults to 10.0): Seconds in which the head of a request must have arrived, and then
            its body; else 408.
        max_body_bytes (`int`, defaults to 1 MiB): Bytes of any other body than those of `max_bundle_bytes`; more: 413.
        max_histories (`int`, defaults to 32): Histories of one request; more: 422. At most `max_queue`.
        max_history_items (`int`, defaults to 2,000): Items of one history; more: 422.
        max_filter_items (`int`, defaults to 10,000): Items of one `allow` or `deny` list; more: 422.
        max_k (`int`, defaults to 100): Items, or sessions, that are asked for per history; more: 422.
        max_bundle_bytes (`int`, defaults to 64 MiB): Bytes of a body of POST /catalogue and POST /model; more: 413.
        max_changes (`int`, defaults to 10,000): Items that one POST /catalogue adds, replaces or removes; more: 422.
        keep_versions (`int`, defaults to 3): Versions in memory, the current one among them; the others can be rolled
            back to.

    Raises:
        ValueError: A number below 1 (`max_wait_ms`: below 0; the two timeouts: 0 or below), NaN, or `max_histories`
            above `max_queue`.
    """

    max_rows: int = field(default=32, metadata={"help": "Histories that are searched together (1: no batches)."})
    max_wait_ms: float = field(
        default=2.0, metadata={"help": "How long a request waits for others to be searched with, in milliseconds."}
    )
    max_queue: int = field(default=512, metadata={"help": "Histories that may wait; beyond: 429."})
    timeout_s: float = field(default=10.0, metadata={"help": "Until a recommendation is given up: 503."})
    body_timeout_s: float = field(default=10.0, metadata={"help": "Until a request must have arrived: 408."})
    max_body_bytes: int = field(default=1_048_576, metadata={"help": "Of POST /recommend; beyond: 413."})
    max_histories: int = field(default=32, metadata={"help": "Per request; beyond: 422, as with the next ones."})
    max_history_items: int = field(default=2_000, metadata={"help": "Per history."})
    max_filter_items: int = field(default=10_000, metadata={"help": "Per allow or deny list."})
    max_k: int = field(default=100, metadata={"help": "Items, or sessions, per history."})
    max_bundle_bytes: int = field(default=67_108_864, metadata={"help": "Of POST /catalogue and POST /model."})
    max_changes: int = field(default=10_000, metadata={"help": "Items that one POST /catalogue names."})
    keep_versions: int = field(
        default=3, metadata={"help": "Versions in memory, to roll back to; the current one too."}
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), 0 if each.name == "max_wait_ms" else 1
            low = value < least if each.name != "timeout_s" and each.name != "body_timeout_s" else value <= 0
            if low or value != value:
                raise ValueError(f"{each.name}={value}: at least {least} ({each.metadata['help']})")
        if self.max_histories > self.max_queue:
            raise ValueError(
                f"max_histories={self.max_histories} and max_queue={self.max_queue}: one request must find room in "
                "the queue. Raise max_queue."
            )


__all__ = ["Limits"]
