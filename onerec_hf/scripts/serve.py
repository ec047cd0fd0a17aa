"""Serves a trained model over HTTP: recommendations, and new catalogues and weights under traffic.

    onerec serve --repo org/onerec-1b --port 8000
    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"histories": [[1003, 1007]], "k": 5}'

It listens on this machine alone unless `--host` says otherwise, and then asks for a token, which the environment
variable ONEREC_SERVE_TOKEN holds. http://localhost:8000/docs lists the paths. The log is one line of JSON per request,
on standard output, without histories.

    onerec serve --repo org/onerec-1b --ray true --replicas 4

serves from four processes behind one address, with Ray Serve (`pip install 'onerec_hf[ray]'`).
"""

import importlib.util
import ipaddress
import logging
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI

from ..recommender import Recommender
from ..serving import Limits, create_app, server
from ..serving.replicas import Replicas
from ..serving.replicas import run as run_replicas
from .parser import ScriptParser

TOKEN = "ONEREC_SERVE_TOKEN"


@dataclass
class ServeArguments:
    repo: str = field(metadata={"help": "Folder or Hub repository of a trained model."})
    host: str = field(default="127.0.0.1", metadata={"help": f"Address; beyond this machine, {TOKEN} must be set."})
    port: int = 8000
    bundles: str | None = field(
        default=None, metadata={"help": "Folder whose subfolders POST /catalogue and POST /model may name."}
    )
    catalogue: str | None = field(default=None, metadata={"help": "Bundle whose items are served from the start."})
    watch_s: float | None = field(
        default=None,
        metadata={"help": "Seconds between looks at the file CURRENT of --bundles: the name of the bundle to serve."},
    )
    name: str = field(default="v1", metadata={"help": "Name of the version that it starts with."})
    num_beams: int = 50
    device: str | None = None
    cuda_graphs: bool = field(default=False, metadata={"help": "On a GPU: searches are recorded and replayed."})
    threads: int | None = field(default=None, metadata={"help": "Of torch; default torch's own choice."})
    log: bool = field(default=True, metadata={"help": "Whether requests are logged."})
    ray: bool = field(default=False, metadata={"help": "Replicas by Ray Serve; the options of `Replicas` are its."})


def check_host(host: str, token: str | None) -> None:
    """Refuses an address that other machines reach, without a token."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not token:
        raise ValueError(
            f"--host {host} can be reached from other machines, and whoever reaches it may swap the model: set the "
            f"environment variable {TOKEN} to a secret, or leave --host out."
        )


def application(args: ServeArguments, limits: Limits, token: str | None) -> FastAPI:
    """Loads the repository, and makes the application; in the process that serves, which may be a replica."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    logger = logging.getLogger("onerec_hf.serving")
    logger.setLevel(logging.INFO if args.log else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))
    recommender = Recommender.from_pretrained(args.repo, args.num_beams, args.device, args.cuda_graphs)
    named: dict[str, Any] = {"name": args.name, "bundles": args.bundles, "catalogue": args.catalogue}
    return create_app(recommender, limits, **named, token=token, swaps=not args.ray, watch_s=args.watch_s)


def main(args: ServeArguments, limits: Limits, replicas: Replicas) -> None:
    """Serves until SIGTERM or SIGINT."""
    token = os.environ.get(TOKEN) or None
    check_host(args.host, token)
    if args.bundles is not None and not os.path.isdir(args.bundles):
        raise ValueError(f"--bundles {args.bundles} is no folder: make it, or leave it out.")
    where = f"http://{args.host}:{args.port} (paths: /docs)"
    if args.ray:
        if importlib.util.find_spec("ray") is None:
            raise ImportError("--ray true needs Ray Serve: pip install 'onerec_hf[ray]'")
        print(f"{replicas.replicas} replicas of {args.repo} start on {where}", flush=True)
        run_replicas(partial(application, args, limits, token), limits, replicas, args.host, args.port)
        return
    app = application(args, limits, token)
    print(f"serving {args.repo} on {where}", flush=True)
    server(app, args.host, args.port, limits).run()


def run(argv: list[str] | None = None) -> None:
    """`onerec serve`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("serve", __doc__, [ServeArguments, Limits, Replicas]).parse(argv))


if __name__ == "__main__":
    run()
