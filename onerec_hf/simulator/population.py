"""Who lives in the simulated world: videos with latent vectors and titles, users with tastes that drift and moods.

All vectors live in one latent space of 32 dimensions: category centres (orthonormal), subjects, authors and items are
nested offsets; a user's taste points at three lasting interests and circles between two passing ones.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .titles import CATEGORIES, NUM_SUBJECTS, SUBJECTS, make_titles

LATENT_DIM = 32
NUM_INTERESTS = 3
DAY_MS = 86_400_000
SLOT_MS = DAY_MS // 4  # a mood lasts six hours

_DURATION_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_DURATION_S = (5.0, 9.5, 26.0, 71.0, 156.0, 310.0, 600.0)  # 5 to 95%: KuaiRand-Pure, over events
_SHARE_UPLOADED_DURING_LOG = 0.25
_ACTIVITY_SHAPE = 1.15  # events per user: 1 + gamma of this shape, rounded down


@dataclass(frozen=True)
class Items:
    """Videos as arrays, row = video_id (N of them)."""

    category: np.ndarray  # (N,) row in CATEGORIES
    author: np.ndarray  # (N,)
    latent: np.ndarray  # (N, 32)
    quality: np.ndarray  # (N,) what every user likes about it
    exposure: np.ndarray  # (N,) weight with which policies that retrieve by popularity find it
    duration_ms: np.ndarray  # (N,) int64
    upload_day: np.ndarray  # (N,) first day of the log is 0
    content_embeddings: np.ndarray  # (N, D) float32
    table: pd.DataFrame


@dataclass(frozen=True)
class Users:
    """Users as arrays, row = user_id (U of them)."""

    interests: np.ndarray  # (U, 3) categories, strongest first
    passing: np.ndarray  # (U, 2) categories of the passing interests
    taste: np.ndarray  # (U, 3, 32) constant, cosine and sine part
    period_days: np.ndarray  # (U,) of the drift
    patience: np.ndarray  # (U,) added to the affinity of every video
    expressiveness: np.ndarray  # (U,) tendency to like, follow, forward
    num_events: np.ndarray  # (U,) impressions in a log
    table: pd.DataFrame


@dataclass(frozen=True)
class _Geometry:
    centres: np.ndarray  # (20, 32)
    subjects: np.ndarray  # (20, 10, 32)


def build_geometry(rng: np.random.Generator) -> _Geometry:
    """Category centres and subject offsets."""
    centres = np.linalg.qr(rng.normal(size=(LATENT_DIM, len(CATEGORIES))))[0].T
    return _Geometry(centres, 0.7 * _directions(rng, len(CATEGORIES), NUM_SUBJECTS))


def _directions(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random vectors of length about one."""
    return rng.normal(size=(*shape, LATENT_DIM)) / np.sqrt(LATENT_DIM)


def build_items(
    num_items: int, num_days: int, embedding_dim: int, geometry: _Geometry, rng: np.random.Generator
) -> Items:
    """Draw authors (about five videos each), then videos, their latent vectors, durations, titles and embeddings."""
    share = np.arange(1, len(CATEGORIES) + 1) ** -0.5
    num_authors = max(1, num_items // 5)
    author_category = rng.permutation(len(CATEGORIES))[
        rng.choice(len(CATEGORIES), size=num_authors, p=share / share.sum())
    ]
    author_subject = rng.integers(NUM_SUBJECTS, size=num_authors)
    author_latent = 0.5 * _directions(rng, num_authors)
    output = np.exp(0.7 * rng.normal(size=num_authors))

    author = rng.choice(num_authors, size=num_items, p=output / output.sum())
    category = author_category[author]
    own_subject = rng.random(num_items) < 0.6
    subject = np.where(own_subject, author_subject[author], rng.integers(NUM_SUBJECTS, size=num_items))
    latent = geometry.centres[category] + geometry.subjects[category, subject] + author_latent[author]
    latent = latent + 0.45 * _directions(rng, num_items)
    quality = rng.normal(size=num_items)
    exposure = np.exp(_exposure_sigma(num_items) * (0.9 * rng.normal(size=num_items) + np.sqrt(1 - 0.81) * quality))
    duration_ms = _durations(exposure, rng)
    upload_day = rng.integers(-30, 0, size=num_items)
    late = rng.permutation(num_items)[: int(_SHARE_UPLOADED_DURING_LOG * num_items)]
    upload_day[late] = rng.integers(0, num_days, size=len(late))
    table = pd.DataFrame(
        {
            "video_id": np.arange(num_items),
            "title": make_titles(category, subject, rng),
            "category": [CATEGORIES[c] for c in category],
            "author_id": author,
            "duration_ms": duration_ms,
            "upload_day": upload_day,
            "tags": [[CATEGORIES[c], SUBJECTS[c][s]] for c, s in zip(category, subject)],
        }
    )
    content = _content_embeddings(latent, embedding_dim, rng)
    return Items(category, author, latent, quality, exposure, duration_ms, upload_day, content, table)


def _exposure_sigma(num_items: int) -> float:
    """Spread of the log exposure weights: small catalogues need more, as users who see no video twice flatten the
    head.
    """
    return float(np.clip(2.2 - np.log10(num_items / 2000), 1.2, 2.2))


def _durations(exposure: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Durations in ms whose quantiles over *events* are the published ones: quantile levels spread evenly over events.

    Events grow about as the square root of the exposure weight.
    """
    order = rng.permutation(len(exposure))
    weight = np.sqrt(exposure[order])
    weight /= weight.sum()
    level = np.empty(len(exposure))
    level[order] = np.cumsum(weight) - weight / 2
    return np.rint(1000 * np.exp(np.interp(level, _DURATION_QUANTILES, np.log(_DURATION_S)))).astype(np.int64)


def _content_embeddings(latent: np.ndarray, embedding_dim: int, rng: np.random.Generator) -> np.ndarray:
    """Linear view of the latent vectors plus noise of a fifth of its variance; knows nothing of quality or
    exposure.
    """
    view = latent @ rng.normal(size=(LATENT_DIM, embedding_dim)) / np.sqrt(LATENT_DIM)
    noise = rng.normal(size=view.shape) * np.sqrt(0.2) * view.std()
    return (view + noise).astype(np.float32)


def build_users(
    num_users: int, mean_events: float, items: Items, geometry: _Geometry, rng: np.random.Generator
) -> Users:
    """Draw interests by how much of the catalogue each category is, tastes around them, and activity."""
    share = np.bincount(items.category, minlength=len(CATEGORIES)) / len(items.category)
    gumbel = rng.gumbel(size=(num_users, len(CATEGORIES)))
    ranked = np.argsort(-(np.log(share + 1e-12) + gumbel), axis=1)
    interests, passing = ranked[:, :NUM_INTERESTS], ranked[:, NUM_INTERESTS : NUM_INTERESTS + 2]
    strength = np.array([0.9, 0.7, 0.55]) * rng.uniform(0.8, 1.2, size=(num_users, NUM_INTERESTS))
    favourite = rng.integers(NUM_SUBJECTS, size=(num_users, NUM_INTERESTS))
    towards = geometry.centres[interests] + geometry.subjects[interests, favourite]  # (U, 3, 32)
    constant = np.einsum("uk,ukd->ud", strength, towards) + 0.5 * _directions(rng, num_users)
    phase = rng.uniform(0, 2 * np.pi, size=num_users)
    first, second = 0.6 * geometry.centres[passing[:, 0]], 0.6 * geometry.centres[passing[:, 1]]
    cosine, sine = np.cos(phase)[:, None], np.sin(phase)[:, None]
    taste = np.stack([constant, cosine * first - sine * second, cosine * second + sine * first], axis=1)

    activity = rng.gamma(_ACTIVITY_SHAPE, max(mean_events - 0.5, 0.0) / _ACTIVITY_SHAPE, size=num_users)
    num_events = np.maximum(np.ceil(activity), 1).astype(np.int64)
    declared = np.where(rng.random(num_users) < 0.8, interests[:, 0], rng.integers(len(CATEGORIES), size=num_users))
    degree = np.digitize(activity, np.quantile(activity, [0.25, 0.5, 0.75]))
    table = pd.DataFrame(
        {
            "user_id": np.arange(num_users),
            "declared_interest": [CATEGORIES[c] for c in declared],
            "activity": np.array(["low", "middle", "high", "full"])[degree],
            "registered_days": rng.integers(30, 1500, size=num_users),
        }
    )
    return Users(
        interests=interests,
        passing=passing,
        taste=taste,
        period_days=rng.uniform(20, 60, size=num_users),
        patience=rng.normal(size=num_users),
        expressiveness=rng.normal(size=num_users),
        num_events=num_events,
        table=table,
    )
