"""Applications over tiny models, and ways to ask them."""

import asyncio
import functools

import numpy as np
import torch
from fastapi.testclient import TestClient

from onerec_hf.baselines import CoOccurrence
from onerec_hf.reranker import Reranker
from onerec_hf.semantic_ids import ResidualKMeans
from onerec_hf.serving import Limits, create_app
from onerec_hf.serving.schemas import RecommendBody

from ..test_recommender import recommender_of
from ..tiny import SIZES, tiny_catalogue

LOGS = [[0, 1, 2, 3], [3, 1, 2, 9], [10, 11, 12, 1], [2, 9, 30]]
EMBEDDINGS = np.random.default_rng(0).normal(size=(65, 6)).astype(np.float32)


@functools.cache
def codebooks(seed=0):
    """Codebooks of the tiny sizes; the tiny catalogue has other codes, which does not matter to anybody."""
    vectors = torch.from_numpy(np.random.default_rng(seed).normal(size=(400, 6)).astype(np.float32))
    return ResidualKMeans(num_levels=3, codebook_size=SIZES[0], seed=seed).fit(vectors)


@functools.cache
def counter():
    return CoOccurrence(65).fit(LOGS)


def reranker():
    """With weights by which the counter, "seen" and the search all have a say."""
    own = Reranker({"counter": counter()}, num_candidates=5)
    kept = dict.fromkeys(own.features, 0.3)
    return Reranker(own.scorers, {"kept": kept, "masked": kept | {"codes": 1.0}}, num_candidates=5)


def recommender(architecture="v2", with_reranker=True, popularity=True, **kwargs):
    """A recommender with codebooks and a re-ranker."""
    catalogue = tiny_catalogue()
    if popularity:
        catalogue.popularity = np.arange(65.0)
    found = recommender_of(architecture, catalogue, quantizer=codebooks(), **kwargs)
    found.ranker.reranker = reranker() if with_reranker else None
    return found


def application(own=None, **kwargs):
    """The application over a recommender, with limits from `kwargs`."""
    names = ("name", "bundles", "catalogue", "token", "swaps", "watch_s")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    return create_app(own or recommender(), Limits(**kwargs), **options)


def client(own=None, **kwargs):
    """A test client; `with client() as c:` runs start and stop of the application."""
    return TestClient(application(own, **kwargs), raise_server_exceptions=False)


async def never():
    """A client that stays."""
    await asyncio.Event().wait()


def ask(service, *bodies, left=never):
    """Answers of bodies that arrive at the same time, or the exceptions in their place."""

    async def all_of_them():
        tasks = [service.recommend(RecommendBody(**body), left) for body in bodies]
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(all_of_them())
