"""A request that was checked against one version, and several of them as one call of [`Recommender.recommend`]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..collators.histories import check_per_user, history_rows, is_per_user
from .errors import Refused, reason
from .limits import Limits
from .schemas import RecommendBody
from .versions import Version


@dataclass(frozen=True, eq=False)
class Question:
    """One request; lists run parallel to `histories`."""

    version: Version
    histories: list[list]
    k: int
    exclude_seen: bool
    session: bool
    rerank: bool
    allow: list[list | None]
    deny: list[list | None]
    events: dict[str, list[np.ndarray]]
    users: dict[str, list]

    @property
    def rows(self) -> int:
        return len(self.histories)

    @property
    def kind(self) -> tuple:
        """Questions of one kind are answered by one search: it has one width, and one set of re-ranking weights."""
        width = max(self.k, self.version.recommender.ranker.width)
        return self.version, width, self.exclude_seen, self.session, self.rerank

    @property
    def length_bucket(self) -> int:
        """Contexts of one bucket are at most half padding."""
        return max(map(len, self.histories)).bit_length()


def check(version: Version, body: RecommendBody, limits: Limits) -> Question:
    """
    The question of a body.

    Raises:
        Refused: 422, for whatever `Recommender.recommend` would refuse, so that no bad request is searched with
            others; for numbers beyond the limits; and for filters that leave no item.
    """
    _check_limits(body, limits)
    recommender, n = version.recommender, len(body.histories)
    catalogue, config = recommender.model.catalogue, recommender.model.config
    if body.session and not config.session_wise:
        raise Refused(422, "no_sessions", "session=true: this model writes single items. Leave it out.")
    try:
        check_per_user(n, events=body.events, users=body.users, allow=body.allow, deny=body.deny)
        collator = recommender.ranker.collator.for_users(body.users, n)
        rows = history_rows(catalogue, collator, body.histories, body.events, body.unknown_items)
        allow, deny = (_per_user(own, n) for own in (body.allow, body.deny))
        permitted, denied = (_indices(catalogue, own, n) for own in (body.allow, body.deny))
        for row, permitted_here, denied_here in zip(rows, permitted, denied):
            seen = row["history"] if body.exclude_seen else ()
            _check_filters(catalogue, permitted_here, denied_here, seen)
    except KeyError as error:
        raise Refused(422, "unknown_items", reason(error)) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise Refused(422, "invalid_request", reason(error)) from error
    return Question(
        version,
        [catalogue.item_ids[row["history"]].tolist() for row in rows],
        min(body.k, catalogue.num_items),
        body.exclude_seen,
        body.session,
        body.rerank,
        allow,
        deny,
        {name: [row[name] for row in rows] for name in body.events},
        {name: list(values) for name, values in body.users.items()},
    )


def _check_limits(body: RecommendBody, limits: Limits) -> None:
    longest = max(map(len, body.histories))
    given = [("k", body.k, limits.max_k), ("histories", len(body.histories), limits.max_histories)]
    given += [("items of a history", longest, limits.max_history_items)]
    for name, own in (("allow", body.allow), ("deny", body.deny)):
        given += [(f"items of {name}", max(len(one or ()) for one in _per_user(own, 1)), limits.max_filter_items)]
    for name, value, most in given:
        if value > most:
            raise Refused(422, "limit", f"{name}: {value}, at most {most} are allowed. Send less, or in parts.")


def _per_user(ids: Any, n: int) -> list[list | None]:
    """A filter, or None, of each of n users."""
    return list(ids) if is_per_user(ids) else [ids] * n


def _indices(catalogue: Any, ids: Any, n: int) -> list[np.ndarray | None]:
    """The items of a filter, of each of n users; None where there is no filter."""
    if not is_per_user(ids):
        return [None if ids is None else catalogue.index_of(ids)] * n
    return [None if own is None else catalogue.index_of(own) for own in ids]


def _check_filters(
    catalogue: Any, permitted: np.ndarray | None, denied: np.ndarray | None, seen: Sequence[int]
) -> None:
    if permitted is None and denied is None and not len(seen):
        return
    taken = np.union1d([] if denied is None else denied, seen).astype(np.int64)
    left = catalogue.num_items - len(taken) if permitted is None else len(np.setdiff1d(permitted, taken))
    if left == 0:
        raise Refused(
            422, "no_items_left", "allow, deny and exclude_seen leave no item of the catalogue: widen the filters."
        )


def recommend(questions: Sequence[Question]) -> list[list[list[Any]]]:
    """One search for questions of one kind; of each question, its users' lists."""
    first = questions[0]
    every = [history for one in questions for history in one.histories]
    allow, deny = ([own for one in questions for own in getattr(one, name)] for name in ("allow", "deny"))
    found = first.version.recommender.recommend(
        every,
        max(one.k for one in questions),
        exclude_seen=first.exclude_seen,
        session=first.session,
        rerank=first.rerank,
        allow=allow if any(own is not None for own in allow) else None,
        deny=deny if any(own is not None for own in deny) else None,
        events=_joined(questions, "events", lambda history: np.full(len(history), np.nan)),
        users=_joined(questions, "users", lambda history: None),
    )
    answers, start = [], 0
    for one in questions:
        answers.append([row[: one.k] for row in found[start : start + one.rows]])
        start += one.rows
    return answers


def _joined(questions: Sequence[Question], field: str, unknown: Any) -> dict[str, list]:
    """The columns that any of the questions has; unknown in the others."""
    names = sorted({name for one in questions for name in getattr(one, field)})
    return {
        name: [
            value
            for one in questions
            for value in getattr(one, field).get(name) or [unknown(history) for history in one.histories]
        ]
        for name in names
    }


__all__ = ["Question", "check", "recommend"]
