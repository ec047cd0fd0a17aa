"""Histories of item ids, as a model is served with them, and the rows that collators take."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from .onerec_collator import OneRecCollator


def is_per_user(ids: Sequence | None) -> bool:
    """Whether `allow` or `deny` is a list of lists (None: no filter), one per user; otherwise it holds for all."""
    kinds = (list, tuple, set, np.ndarray, type(None))
    return ids is not None and len(ids) > 0 and isinstance(next(iter(ids)), kinds)


def check_per_user(
    n: int,
    events: Mapping[str, Sequence] | None = None,
    users: Mapping[str, Sequence] | None = None,
    allow: Sequence | None = None,
    deny: Sequence | None = None,
) -> None:
    """Raises a ValueError unless what is given per user is given for each of the `n` users."""
    given = {f"events[{name!r}]": values for name, values in (events or {}).items()}
    given |= {f"users[{name!r}]": values for name, values in (users or {}).items()}
    for name, ids in (("allow", allow), ("deny", deny)):
        if ids is not None and (isinstance(ids, str) or not hasattr(ids, "__len__")):
            raise ValueError(f"{name}={ids!r}: a list of item ids, also for one item.")
        given |= {name: ids} if ids is not None and is_per_user(ids) else {}
    for name, values in given.items():
        if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != n:
            count = (
                f"{len(values)} values" if hasattr(values, "__len__") and not isinstance(values, str) else repr(values)
            )
            raise ValueError(f"{name} has {count} for {n} users: pass one value or list per user, in their order.")


# what is typed in their place, because `generate`, `recommend_items` or other libraries call it so
_OUR_NAMES = {
    "allowed_items": "allow=[...], item ids that alone may be recommended (a mask goes to `model.recommend_items`)",
    "denied_items": "deny=[...], item ids that may not be recommended",
    "filter_already_liked_items": "exclude_seen=True",
    "num_items": "k",
    "num_return_sequences": "k",
    "top_k": "k",
    "num_beams": "`Recommender.from_pretrained(repo, num_beams=...)`, or `recommender.ranker.num_beams = ...`",
    "batch_size": "a call per batch of histories, or the pipeline, which has a batch_size",
}


def refuse_arguments(unknown: Mapping[str, Any]) -> None:
    """Raises a TypeError for arguments that `Recommender.recommend` does not have; it names those that it has."""
    for name in unknown:
        ours = _OUR_NAMES.get(name, "one of k, allow, deny, exclude_seen, events, users, unknown_items, session")
        raise TypeError(f"Recommender.recommend has no argument {name!r}: write {ours}.")


def allowed_items(
    catalogue: Any, seen: Sequence[Any], exclude_seen: bool, allow: Sequence | None, deny: Sequence | None
) -> torch.Tensor | None:
    """
    The items that each user may get, a mask (B, N) on the catalogue's device; None where nothing is left out.

    Args:
        catalogue: With `index_of`.
        seen: Item indices of each user's history, which `exclude_seen` leaves out.
        allow, deny: Item ids that alone may, or may not, come: for all users, or a list per user, None for a user
            without such a filter.
    """
    if not exclude_seen and allow is None and deny is None:
        return None
    mask = np.full((len(seen), catalogue.num_items), allow is None)
    for ids, value in ((allow, True), (deny, False)):
        if ids is None:
            continue
        for row, own in zip(mask, ids) if is_per_user(ids) else ((mask.T, ids),):
            if own is None:  # this user has no such filter
                row |= value
            else:
                row[catalogue.index_of(own)] = value
    for row, items in zip(mask, seen if exclude_seen else ()):
        row[items] = False
    return torch.from_numpy(mask).to(catalogue.device)


def rows_to_arguments(collator: OneRecCollator, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Rows such as `{"history": [...], "is_like": [...], "age": "20-29"}` as the arguments of [`Recommender.recommend`].

    Args:
        collator: Of the model: it says which columns are read.
        rows: One per user. A column that only some rows have is unknown in the others; columns that the model does not
            read are left aside.

    Returns:
        `histories`, and where a row has them `events`, `users`, `allow` and `deny`.

    Raises:
        ValueError: For a row without `history`, or one that is no mapping among others that are.
    """
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or "history" not in row:
            what = f"the columns {sorted(row)}" if isinstance(row, Mapping) else repr(row)
            raise ValueError(
                f"row {i} has {what}: a row is a mapping with the item ids under 'history', oldest first."
            )
    histories = [row["history"] for row in rows]
    columns = {*collator.event_features, *collator.settings.get("positive", ())}
    events = {
        name: [np.full(len(row["history"]), np.nan) if row.get(name) is None else row[name] for row in rows]
        for name in sorted(columns)
        if any(row.get(name) is not None for row in rows)
    }
    features = {*collator.user_feature_sizes}
    users = {name: [row.get(name) for row in rows] for name in sorted(features) if any(name in row for row in rows)}
    arguments: dict[str, Any] = {"histories": histories}
    arguments |= {name: given for name, given in (("events", events), ("users", users)) if given}
    if any(row.get("deny") is not None for row in rows):
        arguments["deny"] = [list(row.get("deny") or ()) for row in rows]
    if any(row.get("allow") is not None for row in rows):
        if without := [i for i, row in enumerate(rows) if row.get("allow") is None]:
            raise ValueError(
                f"row {without[0]} has no 'allow', others do: give one list per row, or `allow=` for all."
            )
        arguments["allow"] = [list(row["allow"]) for row in rows]
    return arguments


def history_rows(
    catalogue: Any,
    collator: OneRecCollator,
    histories: Sequence[Sequence],
    events: Mapping[str, Sequence[Sequence]],
    unknown_items: Literal["error", "ignore"] = "error",
) -> list[dict]:
    """
    Rows as the collator takes them: item indices, and every event column it reads, unknown where it is not given.

    Args:
        catalogue: The `Catalogue` of the model.
        histories: Per user the ids of the items, oldest first; may be empty.
        events: Event columns, parallel to `histories`.
        unknown_items: What to do with ids that the catalogue does not have; `"ignore"` drops them, with their events.

    Raises:
        KeyError: Unknown item ids. ValueError: Columns that the collator does not read, or that do not run parallel to
            `histories`.
    """
    if unknown_items not in ("error", "ignore"):
        raise ValueError(f"unknown_items={unknown_items!r}: allowed are 'error' and 'ignore'.")
    columns = {*collator.event_features, *collator.settings.get("positive", ())}
    if unknown := sorted(set(events) - columns):
        raise ValueError(f"events has columns {unknown}; the model takes {sorted(columns)}.")
    rows = []
    for i, given in enumerate(histories):
        listed = hasattr(given, "__len__") and not isinstance(given, str)
        history = np.asarray(given, dtype=object) if listed else np.empty(0)
        if history.ndim != 1 or not listed:
            raise ValueError(f"histories[{i}] is {given!r}: a list of item ids per user, also for a single user.")
        absent = np.full(len(history), np.nan)
        own = {name: np.asarray(events[name][i], float) if name in events else absent for name in columns}
        if odd := [name for name, values in own.items() if len(values) != len(history)]:
            raise ValueError(
                f"events[{odd[0]!r}][{i}] has {len(own[odd[0]])} values, the history {len(history)} items."
            )
        items = catalogue.index_of(given, unknown_items)
        if unknown_items == "ignore":
            known = items >= 0
            items, own = items[known], {name: values[known] for name, values in own.items()}
        row = {"user": i, "history": items, **own}
        if collator.settings.get("lifelong") == "lifelong":  # not compressed: the history as it is
            row |= {"lifelong": row["history"]} | {f"lifelong_{name}": values for name, values in own.items()}
        rows.append(row)
    return rows


__all__ = ["allowed_items", "check_per_user", "history_rows", "is_per_user", "refuse_arguments", "rows_to_arguments"]
