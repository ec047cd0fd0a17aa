"""Rows of a split -> tensors of a OneRec model: context, features, targets.

OneRec-V2, section 2.2 (arXiv:2508.20900): an item's keys and values depend on that item alone, so one context serves
all targets. OneRec (arXiv:2502.18965) and its Technical Report (arXiv:2506.13695) encode the context bidirectionally:
one context, one session.
"""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers.utils.hub import cached_file

from ..data.features import EventFeature, category_codes, event_column

CONFIG_NAME, WEIGHTS_NAME = "collator_config.json", "collator.safetensors"


class OneRecCollator:
    r"""
    Makes batches from rows with `user`, `history` and, outside training, `targets`.

    Training rows (no `targets`): the history without its last item is the context, and each of its items but the first
    is a target that sees the items before it. Rows with `targets`: the whole history is the context of every target,
    as for the k impressions of one request that share a context (OneRec-V2, section 2.1; [`session_splits`] makes such
    rows).

    Args:
        item_token_ids (`np.ndarray` of shape (N, L)): Token ids of every item, as
            `SemanticIdTokenizer.encode_semantic_ids` makes them.
        max_history (`int`, defaults to 50): Items of context; older ones are dropped.
        event_features (`dict[str, EventFeature]`, *optional*): List columns of the rows that become context features.
        item_features (`dict[str, np.ndarray]`, *optional*): Categories of shape (N,), looked up for every context
            item.
        user_features (`dict[str, np.ndarray]`, *optional*): Categories of shape (U,), looked up by `user`; a `user`
            that is no row of them, -1 or a new one, is unknown: 0.
        user_categories (`dict[str, dict[str, int]]`, *optional*): [`category_map`] of each of them. Saved with the
            model, so that whoever serves it gives the values and not their numbers.
        pad_token_id (`int`, defaults to 0).

    Batches hold `context_ids` (B, T, L), `context_mask` (B, T), `target_ids` (B, n, L), `target_positions` (B, n), of
    training rows `causal_targets` (B,), and, where configured, `context_features` (B, T, F) and `user_features` (B,
    F_u), in the order of `context_feature_sizes`.
    """

    def __init__(
        self,
        item_token_ids: np.ndarray,
        max_history: int = 50,
        event_features: Mapping[str, EventFeature] | None = None,
        item_features: Mapping[str, np.ndarray] | None = None,
        user_features: Mapping[str, np.ndarray] | None = None,
        user_categories: Mapping[str, Mapping[str, int]] | None = None,
        pad_token_id: int = 0,
    ):
        if max_history < 1:
            raise ValueError(f"max_history={max_history}: at least one item of context is needed.")
        self.item_token_ids = np.asarray(item_token_ids, dtype=np.int64)
        self.max_history, self.pad_token_id = max_history, pad_token_id
        self.settings: dict[str, Any] = {
            "max_history": max_history,
            "pad_token_id": pad_token_id,
        }  # what is saved beside the features
        self.event_features = {name: EventFeature(*feature) for name, feature in (event_features or {}).items()}
        self.item_features = {name: np.asarray(values) for name, values in (item_features or {}).items()}
        self.user_features = {name: np.asarray(values) for name, values in (user_features or {}).items()}
        if both := set(self.event_features) & set(self.item_features):
            raise ValueError(f"{sorted(both)} are event features and item features at once: rename one side.")
        for name, values in self.item_features.items():
            if values.shape != (len(self.item_token_ids),):
                raise ValueError(
                    f"item feature {name!r} has shape {values.shape}, there are {len(self.item_token_ids)} items."
                )
        sizes = {name: feature.size for name, feature in self.event_features.items()}
        sizes |= {name: int(values.max()) + 1 for name, values in self.item_features.items()}
        # `context_features` and `user_features` of the model config: sorted by name, as the config is
        self.context_feature_sizes = dict(sorted(sizes.items()))
        self.user_feature_sizes = {name: int(values.max()) + 1 for name, values in sorted(self.user_features.items())}
        self.user_categories = {name: dict(known) for name, known in (user_categories or {}).items()}
        if surplus := sorted(set(self.user_categories) - set(self.user_features)):
            raise ValueError(
                f"user_categories of {surplus}, which are no user features; there are {sorted(self.user_features)}."
            )

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if "targets" in rows[0]:
            batch = self.context(rows)
            targets = [row["targets"] for row in rows]
            positions = [np.full(len(t), min(len(row["history"]), self.max_history)) for t, row in zip(targets, rows)]
        else:
            histories = [np.asarray(row["history"], dtype=np.int64)[-self.max_history - 1 :] for row in rows]
            batch = self._context(rows, drop_last=True)
            targets = [history[1:] for history in histories]
            positions = [np.arange(1, len(target) + 1) for target in targets]
        batch["target_ids"] = self.pad_targets(targets)
        target_positions = np.zeros(batch["target_ids"].shape[:2], dtype=np.int64)
        for i, position in enumerate(positions):
            target_positions[i, : len(position)] = position
        batch["target_positions"] = torch.from_numpy(target_positions)
        if "targets" not in rows[0]:
            # what the positions say, for a model to know without reading them; a tensor, as all that a batch holds
            batch["causal_targets"] = torch.ones(len(rows), dtype=torch.bool)
        return batch

    def context(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The context tensors alone, as `generate` takes them."""
        return self._context(rows)

    def _context(self, rows: list[dict], drop_last: bool = False) -> dict[str, torch.Tensor]:
        """`drop_last` leaves out each history's last item."""
        window = slice(-self.max_history - drop_last, -1 if drop_last else None)
        events = [self.events(row) for row in rows]
        return self.pad_events([(items[window], codes[window]) for items, codes in events]) | self.users(rows)

    def events(self, row: dict, column: str = "history", prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """
        The items (T,) of a list column of a row, and their categories (T, F) in the order of `context_feature_sizes`;
        the event columns that run parallel to it are named `prefix` + feature name.
        """
        if column not in row:
            raise KeyError(f"the rows have no column {column!r}; they have {sorted(row)}.")
        items = np.asarray(row[column], dtype=np.int64)
        codes = np.zeros((len(items), len(self.context_feature_sizes)), dtype=np.int64)
        for j, name in enumerate(self.context_feature_sizes):
            if name in self.event_features:
                values = event_column(row, prefix + name, column)
                codes[:, j] = self.event_features[name].encode(values, prefix + name)
            else:
                codes[:, j] = self.item_features[name][items]
        return items, codes

    def pad_events(
        self, events: list[tuple[np.ndarray, np.ndarray]], width: int | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Padded on the right: `context_ids` (B, T, L), `context_mask` (B, T) and, if configured, `context_features` (B,
        T, F); T is `width`, or the longest of the batch.
        """
        if width is None:
            width = max(1, *(len(items) for items, _ in events))
        ids = np.full((len(events), width, self.item_token_ids.shape[1]), self.pad_token_id)
        mask = np.zeros((len(events), width), dtype=bool)
        features = np.zeros((len(events), width, len(self.context_feature_sizes)), dtype=np.int64)
        for i, (items, codes) in enumerate(events):
            ids[i, : len(items)] = self.item_token_ids[items]
            mask[i, : len(items)] = True
            features[i, : len(items)] = codes
        batch = {"context_ids": torch.from_numpy(ids), "context_mask": torch.from_numpy(mask)}
        if features.shape[2]:
            batch["context_features"] = torch.from_numpy(features)
        return batch

    def pad_targets(self, targets: list) -> torch.Tensor:
        """`target_ids` (B, n, L) of lists of items."""
        width = max(1, *(len(items) for items in targets))
        target_ids = np.full((len(targets), width, self.item_token_ids.shape[1]), self.pad_token_id)
        for i, items in enumerate(targets):
            target_ids[i, : len(items)] = self.item_token_ids[np.asarray(items, dtype=np.int64)]
        return torch.from_numpy(target_ids)

    def users(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """`user_features` (B, F_u), if configured."""
        if not self.user_features:
            return {}
        users = np.array([row["user"] for row in rows], dtype=np.int64)
        features = []
        for name in self.user_feature_sizes:
            table = self.user_features[name]
            known = (users >= 0) & (users < len(table))
            features.append(np.where(known, table[np.where(known, users, 0)], 0))
        return {"user_features": torch.from_numpy(np.stack(features, axis=1))}

    def for_users(self, users: Mapping[str, Sequence], n: int) -> "OneRecCollator":
        """A copy for rows whose `user` is 0 to n - 1: the users of one request, with the features that are given for
        them.
        """
        own = copy.copy(self)
        own.user_features = self.user_categories_of(users, n)
        return own

    def user_categories_of(self, users: Mapping[str, Sequence], n: int) -> dict[str, np.ndarray]:
        """
        Categories (n,) of every user feature, from values that are given when a model is served.

        Args:
            users: Feature -> one value for each of the n users: as in training where `user_categories` knows the
                feature, else a category. What is left out is unknown, 0.

        Raises:
            ValueError: A feature that the model does not have, or a category outside 0 to size - 1.
        """
        sizes = self.user_feature_sizes
        if wrong := sorted(set(users) - set(sizes)):
            raise ValueError(
                f"users[{wrong[0]!r}]: the model takes {sorted(sizes)}, one value for each of the {n} users."
            )
        found = {}
        for name, size in sizes.items():
            values = users.get(name, [None] * n)
            if name in self.user_categories:
                found[name] = category_codes(values, self.user_categories[name])
                continue
            codes = np.array([0 if value is None else value for value in values])
            if codes.dtype.kind not in "iu" or not ((codes >= 0) & (codes < size)).all():
                raise ValueError(
                    f"users[{name!r}] holds {list(values)!r}: the categories 0 (unknown) to {size - 1} are allowed."
                )
            found[name] = codes.astype(np.int64)
        return found

    # ---- saved with the model

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Writes `collator_config.json`, and `collator.safetensors` with the tables where there are any.

        The rows of the users stay behind: they are those of a training set, not of the users that a model is served
        for. Which category each value of a user feature became is saved.
        """
        config, arguments = self._saved()
        tables = {f"{kind}/{name}": values for kind, own in arguments.items() for name, values in own.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"collator_class": type(self).__name__, **config, "tables": sorted(tables)}, indent=2)
        (Path(folder) / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        if tables:
            save_file({name: np.ascontiguousarray(v) for name, v in tables.items()}, Path(folder) / WEIGHTS_NAME)

    def _saved(self) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """The arguments of the constructor as JSON, and those that are tables: argument -> name -> array."""
        config = self.settings | {
            "event_features": {name: list(feature) for name, feature in self.event_features.items()},
            "user_features": self.user_feature_sizes,
            "user_categories": self.user_categories,
        }
        return config, {"item_features": {name: v.astype(np.int64) for name, v in self.item_features.items()}}

    @classmethod
    def from_pretrained(cls, repo: str | os.PathLike, item_token_ids: np.ndarray, **hub_kwargs) -> "OneRecCollator":
        """
        The collator of a folder or Hub repository, of whatever class was saved.

        Args:
            item_token_ids (`np.ndarray` of shape (N, L)): Token ids of every item of the repository's catalogue.
            hub_kwargs: `revision`, `token`, `cache_dir`, ... as `from_pretrained` takes them.

        Raises:
            OSError: When the repository has no `collator_config.json`.
            ValueError: When a file cannot be read, or the tables are not those of the catalogue's items.
        """
        path = cached_file(str(repo), CONFIG_NAME, **hub_kwargs)
        try:
            config = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} cannot be read ({error}): it is cut off. Save or download it again.") from error
        name, known = config.pop("collator_class"), {kind.__name__: kind for kind in _with_subclasses(OneRecCollator)}
        if name not in known:
            raise ValueError(
                f"{repo}: {CONFIG_NAME} names the collator {name!r}, known are {sorted(known)}. Update onerec_hf."
            )
        tables = config.pop("tables")
        values = _read_tables(cached_file(str(repo), WEIGHTS_NAME, **hub_kwargs)) if tables else {}
        if absent := sorted(set(tables) - set(values)):
            raise ValueError(
                f"{repo}: {WEIGHTS_NAME} lacks {absent}, which {CONFIG_NAME} names: they are not of one model."
            )
        # a table with the highest category alone: the sizes are those of the model, the users come with each request
        users = {feature: np.array([size - 1]) for feature, size in config.pop("user_features").items()}
        arguments: dict[str, dict] = {"user_features": users}
        for table in tables:
            kind, _, feature = table.partition("/")
            arguments.setdefault(kind, {})[feature] = values[table]
        try:
            return known[name](item_token_ids, **config, **arguments)
        except ValueError as error:
            raise ValueError(f"{repo}: {CONFIG_NAME} and {WEIGHTS_NAME} do not fit the catalogue: {error}") from error


def _with_subclasses(kind: type) -> list[type]:
    children: list[type] = kind.__subclasses__()
    return [kind, *(found for child in children for found in _with_subclasses(child))]


def _read_tables(path: str | None) -> dict[str, np.ndarray]:
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): it is cut off. Save or download it again.") from error


class SessionCollator(OneRecCollator):
    r"""
    For models whose context is encoded as a whole, so that all targets of a row see all of it: OneRec (one session per
    row).

    Takes the rows of [`session_splits`] or [`target_rows`]. Batches hold the context tensors of [`OneRecCollator`] and
    `target_ids` (B, m, L): the m items of one session in order, pad tokens where a session is shorter. The model puts
    BOS before each item.

    Args:
        item_token_ids (`np.ndarray` of shape (N, L)): Token ids of every item.
        max_history (`int`, defaults to 50): Items of context; older ones are dropped.
        event_features, item_features, user_features, user_categories, pad_token_id: As [`OneRecCollator`].

    Raises:
        ValueError: As [`OneRecCollator`]; on a call, rows without `targets`.
    """

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if "targets" not in rows[0]:
            raise ValueError(
                f"the rows have no column 'targets', only {sorted(rows[0])}: a context that is encoded as a whole "
                "must end before its targets. Make the rows with session_splits() or target_rows()."
            )
        return self.context(rows) | {"target_ids": self.pad_targets([row["targets"] for row in rows])}
