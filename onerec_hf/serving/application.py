"""The HTTP application: `create_app` is what `onerec serve`, tests and other servers start from."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

from .._version import __version__
from ..recommendation_files import RecommendedSession
from ..recommender import Recommender
from .bundles import load_catalogue, rehearse
from .errors import add_handlers, json_response
from .gate import OPEN, Gate
from .limits import Limits
from .schemas import CatalogueBody, ModelBody, RecommendBody
from .service import Service
from .versions import Version
from .watch import follow

router = APIRouter()


def create_app(
    recommender: Recommender,
    limits: Limits | None = None,
    *,
    name: str = "v1",
    bundles: str | os.PathLike | None = None,
    catalogue: str | None = None,
    token: str | None = None,
    swaps: bool = True,
    watch_s: float | None = None,
) -> FastAPI:
    """
    The application that serves a recommender; `app.state.service` is the [`Service`] behind it.

    Args:
        recommender ([`Recommender`]): Belongs to the service from now on.
        limits ([`Limits`], *optional*): What it takes of clients.
        name (`str`, defaults to `"v1"`): Of the version that it starts with, and of its weights.
        bundles (`str`, *optional*): Folder whose subfolders `POST /catalogue` and `POST /model` may name.
        catalogue (`str`, *optional*): Bundle whose items are served from the start, in place of the repository's.
        token (`str`, *optional*): Every path but `/health`, `/ready` and the OpenAPI page asks for it.

        swaps (`bool`, defaults to `True`): Whether `POST /catalogue` and `POST /model` change this process; off for
            one of several replicas, which would then answer from different versions.
        watch_s (`float`, *optional*): Seconds between looks at the file CURRENT in `bundles`, which names the
            catalogue bundle to serve.

    Raises:
        ValueError, OSError: Where the start bundle, or a search with the recommender, fails; for `watch_s` without
            `bundles`.
    """
    if watch_s is not None and (bundles is None or not watch_s > 0):
        raise ValueError(f"watch_s={watch_s} with bundles={bundles}: seconds above 0, and a folder to watch.")
    limits = limits or Limits()
    version = Version(name, recommender, recommender, name, name)
    service = Service(version, limits, bundles, swaps)
    if catalogue is not None:
        own = load_catalogue(recommender, service._folder(catalogue))
        service = Service(Version(name, own, recommender, name, catalogue), limits, bundles, swaps)
    rehearse(service.versions.current.recommender)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = None if watch_s is None else asyncio.create_task(follow(service, watch_s))
        yield
        if watching is not None:
            watching.cancel()
        await service.close()

    app = FastAPI(title="onerec", version=__version__, lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    add_handlers(app)
    paths = ["/recommend", "/catalogue", "/model", "/info", "/metrics", *OPEN]
    app.add_middleware(Gate, limits=limits, metrics=service.metrics, token=token, paths=paths)
    plain = app.openapi
    app.openapi = lambda: _with_examples(plain(), service)  # type: ignore[method-assign]
    return app


def _with_examples(schema: dict[str, Any], service: Service) -> dict[str, Any]:
    """Bodies that this service answers: with ids of its catalogue."""
    ids = service.versions.current.recommender.model.catalogue.item_ids[:4].tolist()
    filtered = {"histories": [ids[:2], []], "k": 3, "exclude_seen": True, "deny": [ids[2:3], None]}
    examples = {
        "RecommendBody": [{"histories": [ids[:2]], "k": 5}, filtered],
        "CatalogueBody": [{"remove": ids[-1:], "name": "without-one"}],
        "ModelBody": [{"rollback_to": service.versions.current.name}],
    }
    for name, own in examples.items():
        schema["components"]["schemas"][name]["examples"] = own
    return schema


@router.post("/recommend", summary="The k best items of each user")
async def recommend(body: RecommendBody, request: Request) -> Response:
    """Takes the arguments of `Recommender.recommend`; `version` and `fingerprint` say what answered."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    version, answer = await request.app.state.service.recommend(body, left)
    waited, searched = (round(1000 * seconds, 2) for seconds in (answer.waited, answer.searched))
    request.scope["onerec_log"] |= {
        "version": version.name,
        "rows": len(body.histories),
        "k": body.k,
        "queue_ms": waited,
        "search_ms": searched,
        "batch_rows": answer.batch_rows,
    }
    results = [[_shown(one) for one in row] for row in answer.lists]
    return json_response({"version": version.name, "fingerprint": version.fingerprint, "results": results})


def _shown(found: Any) -> dict[str, Any]:
    if isinstance(found, RecommendedSession):
        return {"item_ids": found.item_ids, "score": found.score, "metadata": found.metadata}
    return {"item_id": found.item_id, "score": found.score, "metadata": found.metadata}


@router.post("/catalogue", summary="Other items: a bundle, changes, or a roll back")
async def catalogue(body: CatalogueBody, request: Request) -> Response:
    """Running requests end on the version they began with; a bundle that is refused changes nothing."""
    request.app.state.service.check_swaps()
    return json_response((await request.app.state.service.change_catalogue(body)).summary())


@router.post("/model", summary="Other weights: a repository, or a roll back")
async def model(body: ModelBody, request: Request) -> Response:
    """Running requests end on the version they began with; a repository that is refused changes nothing."""
    request.app.state.service.check_swaps()
    return json_response((await request.app.state.service.change_model(body)).summary())


@router.get("/info", summary="Model, catalogue, versions, limits")
async def info(request: Request) -> Response:
    """What is served now, and the versions that one can roll back to."""
    return json_response({"onerec_hf": __version__, **request.app.state.service.info()})


@router.get("/health", summary="Whether the process answers")
async def health() -> Response:
    """200 as long as the event loop runs."""
    return json_response({"status": "ok"})


@router.get("/ready", summary="Whether requests should come")
async def ready(request: Request) -> Response:
    """503 while the service stops, or where a search hangs."""
    why = request.app.state.service.not_ready()
    return json_response({"status": why or "ok"}, 200 if why is None else 503)


@router.get("/metrics", summary="Counts and times, for Prometheus")
async def metrics(request: Request) -> Response:
    """Text format of Prometheus."""
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


__all__ = ["create_app"]
