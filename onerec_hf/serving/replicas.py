"""The application as a deployment of Ray Serve: replicas behind one address, replaced where they die and rolled over
to another model. Needs `onerec_hf[ray]`.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .limits import Limits

APP = "onerec"  # of Ray Serve, and its one deployment


@dataclass
class Replicas:
    """
    How many processes answer, and on what.

    Raises:
        ValueError: For numbers that Ray Serve would refuse later.
    """

    replicas: int = field(default=2, metadata={"help": "Processes that answer; with --max_replicas, the fewest."})
    max_replicas: int | None = field(
        default=None, metadata={"help": "Most processes; they come and go with the requests under way."}
    )
    target_requests: int = field(
        default=32, metadata={"help": "Requests under way per replica that --max_replicas aims at."}
    )
    replica_cpus: float = field(default=1.0, metadata={"help": "Cores that Ray sets aside for a replica."})
    replica_gpus: float = field(default=0.0, metadata={"help": "GPUs, or a share of one, likewise."})
    ray_address: str | None = field(
        default=None,
        metadata={
            "help": "Running Ray cluster (auto, or HOST:PORT) that is deployed to; the same command with another "
            "--repo rolls it out. Default: Ray starts with this command, on this machine, and ends with it."
        },
    )

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.max_replicas is not None and self.max_replicas < self.replicas):
            raise ValueError(
                f"replicas={self.replicas}, max_replicas={self.max_replicas}: at least 1, and at most max_replicas."
            )
        if self.target_requests < 1:
            raise ValueError(f"target_requests={self.target_requests}: at least 1 request per replica.")


def start(replicas: Replicas, host: str, port: int) -> None:
    """
    Connects to the cluster, or starts one of this machine, and has Ray Serve listen on `host` and `port`.

    Ray's own ports are not those of `host`: other machines reach them, and Ray asks them for its token.
    """
    # Ray Serve kills a proxy that is not ready within 5 seconds, which a busy machine does not always manage.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    import ray
    from ray import serve

    if not ray.is_initialized():
        if replicas.ray_address is None:
            ray.init("local", include_dashboard=False)  # also where another cluster runs, or ran, here
        else:
            ray.init(replicas.ray_address)
    serve.start(http_options={"host": host, "port": port})


def deployment(build: Callable[[], Any], limits: Limits, replicas: Replicas) -> Any:
    """
    The application as Ray Serve takes it.

    Args:
        build: Makes the application; called in each replica, so it must be picklable.
        limits: Of the application: a replica holds as many requests as may wait, and Ray Serve as many again.
        replicas: How many.
    """
    from ray import serve

    def build_app() -> Any:  # Ray Serve asks for a plain function
        return build()

    many: dict[str, Any] = {"num_replicas": replicas.replicas}
    if replicas.max_replicas is not None:
        own = {"min_replicas": replicas.replicas, "max_replicas": replicas.max_replicas}
        many = {"autoscaling_config": own | {"target_ongoing_requests": replicas.target_requests}}
    return serve.deployment(
        serve.ingress(build_app)(),
        name=APP,
        max_ongoing_requests=limits.max_queue,
        max_queued_requests=limits.max_queue,
        ray_actor_options={"num_cpus": replicas.replica_cpus, "num_gpus": replicas.replica_gpus},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=limits.timeout_s + limits.body_timeout_s,
        max_surge_percent=50,
        **many,
    )


def deploy(build: Callable[[], Any], limits: Limits, replicas: Replicas) -> None:
    """
    Deploys the application, or rolls it out over one that is running; returns when all replicas are ready. Arguments
    as of [`deployment`].

    In a roll-out, a new replica starts before an old one leaves, and the old one answers what it has begun.
    """
    from ray import serve

    serve.run(deployment(build, limits, replicas).bind(), name=APP)


def run(build: Callable[[], Any], limits: Limits, replicas: Replicas, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT; on a cluster that runs already, deploys and returns."""
    import ray
    from ray import serve

    start(replicas, host, port)
    if replicas.ray_address is not None:
        deploy(build, limits, replicas)
        return
    stop = threading.Event()
    # in place of Ray's own, which ends in an abort, and before the first replica answers
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: stop.set())
    deploy(build, limits, replicas)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


__all__ = ["Replicas", "deploy", "deployment", "run", "start"]
