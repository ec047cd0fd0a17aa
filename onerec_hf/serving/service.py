"""The service behind the HTTP paths: it answers questions, and swaps versions while it does."""

import asyncio
import os
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from .batcher import Answer, MicroBatcher
from .bundles import changed, load_catalogue, load_model, rehearse, save_bundle
from .errors import Refused, reason
from .limits import Limits
from .metrics import Metrics, log
from .questions import Question, check, recommend
from .schemas import CatalogueBody, ModelBody, RecommendBody
from .versions import Version, Versions


class Service:
    r"""
    A recommender under traffic.

    Args:
        version ([`Version`]): Served from the start.
        limits ([`Limits`]): What it takes.
        bundles (`str`, *optional*): Folder of bundles. Names in requests are folders in it; without it nothing is read
            from disk, and changes of the catalogue live in memory alone.
        swaps (`bool`, defaults to `True`): Whether requests may change the version.
    """

    def __init__(self, version: Version, limits: Limits, bundles: str | os.PathLike | None = None, swaps: bool = True):
        self.limits, self.metrics, self.swaps = limits, Metrics(), swaps
        self.bundles = None if bundles is None else Path(bundles)
        self.versions = Versions(version, limits.keep_versions)
        self.batcher = MicroBatcher(self._search, limits)
        self.draining = False
        self._swapping = asyncio.Lock()
        self.metrics.queued.set_function(lambda: self.batcher.rows)
        self._say_version()

    def _search(self, questions: Sequence[Question]) -> list:
        return recommend(questions)

    def not_ready(self) -> str | None:
        """Why no requests should come now; None where they may."""
        if self.draining:
            return "the service is stopping"
        since = self.batcher.busy_since
        if since is not None and asyncio.get_running_loop().time() - since > self.limits.timeout_s:
            return f"a search runs for more than {self.limits.timeout_s:g} seconds"
        return None

    async def recommend(self, body: RecommendBody, left: Callable[[], Awaitable]) -> tuple[Version, Answer]:
        """
        Answers a body on the version that is current when it is called.

        Args:
            left: Returns when the client is gone; its question then leaves the queue.

        Raises:
            Refused: 422 for the body, 429 for a full queue, 503 past the time limit or while the service stops; 500
                where the search fails.
        """
        if self.draining:
            raise Refused(503, "draining", "the service is stopping: ask another replica.", retry_after=1)
        version = self.versions.current
        question = check(version, body, self.limits)
        answer, gone = (asyncio.ensure_future(one) for one in (self.batcher.ask(question), left()))
        try:
            await asyncio.wait({answer, gone}, timeout=self.limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                found = answer.result()
            elif gone.done():
                raise Refused(499, "client_left", "the client closed the connection.")
            else:
                raise Refused(
                    503,
                    "timeout",
                    f"no answer within {self.limits.timeout_s:g} seconds: send the same request again later.",
                    retry_after=1,
                )
        except Refused:
            raise
        except Exception as error:
            _log_error("search_failed", error)
            raise Refused(500, "search_failed", "the search failed; the log of the service says where.") from error
        finally:
            answer.cancel()
            gone.cancel()
        self.metrics.waited.observe(found.waited)
        self.metrics.searched.observe(found.searched)
        self.metrics.batch_rows.observe(found.batch_rows)
        return version, found

    def check_swaps(self) -> None:
        """Refused, 409, where a request may not change the version."""
        if not self.swaps:
            what = "this is one of several replicas, which must answer from the same version"
            raise Refused(409, "replicas", f"{what}: roll out with `onerec serve --ray true --ray_address ...`.")

    async def change_catalogue(self, body: CatalogueBody) -> Version:
        """
        Other items under the current weights.

        Raises:
            Refused: 404, 409 or 422 with the reason; the current version stays.
        """
        ways = [body.bundle is not None, bool(body.items or body.remove), body.rollback_to is not None]
        if sum(ways) != 1:
            raise Refused(422, "invalid_request", "give one of: bundle; items and remove; rollback_to.")
        if len(body.items) + len(body.remove) > self.limits.max_changes:
            most = self.limits.max_changes
            raise Refused(422, "limit", f"at most {most} items per change: send it in parts, or publish a bundle.")

        def build(current: Version, name: str) -> Version:
            if body.fingerprint not in (None, current.fingerprint):
                what = f"the catalogue is {current.fingerprint} now, the change is for {body.fingerprint}"
                raise Refused(409, "fingerprint", f"{what}: read GET /info, and make it anew.")
            if body.bundle is not None:
                found = load_catalogue(current.origin, self._folder(body.bundle))
            else:
                found = changed(current.origin, current.recommender, body.items, body.remove)
            rehearse(found)
            if body.bundle is None and self.bundles is not None:
                save_bundle(found, self.bundles / name)
            return Version(name, found, current.origin, current.model, body.bundle or name)

        return await self._swap("catalogue", body.rollback_to, body.name, body.bundle, build)

    async def change_model(self, body: ModelBody) -> Version:
        """
        Other weights.

        Raises:
            Refused: 404, 409 or 422 with the reason; the current version stays.
        """
        if (body.bundle is None) == (body.rollback_to is None):
            raise Refused(422, "invalid_request", "give one of: bundle; rollback_to.")

        def build(current: Version, name: str) -> Version:
            assert body.bundle is not None
            keep = body.catalogue == "keep"
            origin, found = load_model(self._folder(body.bundle), current.recommender, keep)
            rehearse(found)
            return Version(name, found, origin, body.bundle, current.catalogue if keep else body.bundle)

        return await self._swap("model", body.rollback_to, body.name, body.bundle, build)

    def _folder(self, bundle: str) -> Path:
        if self.bundles is None:
            raise Refused(422, "no_bundles", "this service has no folder of bundles: start it with --bundles FOLDER.")
        folder = self.bundles / bundle
        if not folder.is_dir():
            there = f"there are {self._bundle_names()[-10:]}"
            raise Refused(404, "unknown_bundle", f"there is no bundle {bundle!r}; {there}.")
        return folder

    def _bundle_names(self) -> list[str]:
        if self.bundles is None or not self.bundles.is_dir():
            return []
        return sorted(each.name for each in self.bundles.iterdir() if each.name[0] != ".")

    async def _swap(
        self,
        kind: str,
        rollback_to: str | None,
        name: str | None,
        bundle: str | None,
        build: Callable[[Version, str], Version],
    ) -> Version:
        """Builds the next version in a thread of its own, beside the traffic, and then makes it the current one."""
        if self._swapping.locked():
            raise Refused(409, "swap_running", "another version is being loaded: wait for it.", retry_after=1)
        async with self._swapping:
            start, before = asyncio.get_running_loop().time(), self.versions.current
            try:
                if rollback_to is not None:
                    version = self.versions.roll_back(rollback_to)
                else:
                    free = self.versions.free_name(name or bundle, self._bundle_names() if bundle is None else ())
                    version = await asyncio.to_thread(build, before, free)
                    self.versions.swap(version)
            except Exception as error:
                self.metrics.swaps.labels(kind, "refused").inc()
                refused = error if isinstance(error, Refused) else None
                if refused is None:
                    _log_error("swap_failed", error)
                    refused = Refused(422, "bad_bundle", f"{reason(error)} Version {before.name!r} stays.")
                log("swap", kind=kind, outcome="refused", version=before.name, code=refused.code)
                raise refused from error
            self.metrics.swaps.labels(kind, "done").inc()
            self._say_version()
            seconds = asyncio.get_running_loop().time() - start
            log("swap", kind=kind, outcome="done", version=version.name, before=before.name, seconds=round(seconds, 3))
            return version

    def _say_version(self) -> None:
        one = self.versions.current
        self.metrics.version.clear()
        self.metrics.version.labels(one.name, one.model, one.catalogue, one.fingerprint).set(1)
        self.metrics.items.set(len(one.recommender.model.catalogue))

    def info(self) -> dict[str, Any]:
        """As `GET /info` sends it."""
        current = self.versions.current
        recommender = current.recommender
        model, collator, reranker = recommender.model, recommender.ranker.collator, recommender.ranker.reranker
        return {
            "version": current.name,
            "catalogue": {"num_semantic_ids": model.catalogue.num_semantic_ids, **current.summary()},
            "model": {
                "class": type(model).__name__,
                "parameters": sum(each.numel() for each in model.parameters()),
                "device": str(model.device),
                "num_beams": recommender.ranker.num_beams,
                "max_history": collator.max_history,
                "events": sorted({*collator.event_features, *collator.settings.get("positive", ())}),
                "users": sorted(collator.user_feature_sizes),
                "sessions": bool(model.config.session_wise),
                "reranker": None if reranker is None else list(reranker.parts),
            },
            "versions": [one.summary() for one in self.versions.kept.values()],
            "limits": vars(self.limits),
        }

    async def close(self) -> None:
        """Answers what waits; new questions get 503."""
        self.draining = True
        await self.batcher.close()


def _log_error(event: str, error: BaseException) -> None:
    """Type and place; not the message, which may quote what a client sent."""
    places = [f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)]
    log(event, error=type(error).__name__, places=places[-6:])


__all__ = ["Service"]
