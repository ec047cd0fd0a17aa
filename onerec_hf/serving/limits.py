"""What a service takes from one client and from all of them, and how long anybody waits."""

from dataclasses import dataclass, field, fields


@dataclass
class Limits:
    """
    Limits of a service; past them a client gets 408, 413, 422, 429 or 503 with a reason, and never waits for ever.

    Raises:
        ValueError: For a number below what the service can work with.
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
