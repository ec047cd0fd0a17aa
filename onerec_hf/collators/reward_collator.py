"""Rows of logged exposures -> tensors and labels of the reward models (arXiv:2502.18965; Technical Report,
arXiv:2506.13695).
"""

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..data.features import EventFeature, event_column
from ..data.labels import event_labels, session_labels
from ..data.past_rates import period_of
from .onerec_collator import OneRecCollator

NOW = math.inf  # a `session_start`: everything in the history is known


class RewardCollator(OneRecCollator):
    r"""
    Takes the rows of [`session_splits`]: what a user was shown, and the history before it. `SessionConfig(...,
    max_events=1)` with the criteria off makes one row per exposure, for the P-Score.

    Args:
        targets (`Sequence[str]`): Objectives, see [`event_labels`].
        session_wise (`bool`): One label per session (the session-wise reward model) or per item (P-Score).
        candidate_features (`dict[str, np.ndarray]`, *optional*): Categories of shape (N,), looked up for every
            candidate.
        request_features (`dict[str, EventFeature]`, *optional*): Event columns that are known before an item is shown
            (scenario, hour); read from the column `target_<name>`.
        boundaries (`Sequence[float]`, *optional*): Increasing times at which what is known about users and items is
            renewed, in the unit of the timestamps. A row sees the history before the last boundary at or before its
            `session_start`, and the numbers of that period. Without boundaries it sees all of its history. With them,
            the feedback on one exposure of a period does not move the scores of the next ones; otherwise a user's only
            like would be preceded by the low scores of a user without likes and followed by high ones, and an AUC
            within users would be below .5 for no fault of the model.
        item_numbers, user_numbers (`dict[str, np.ndarray]`, *optional*): Of shape (P + 1, N) and (P + 1, U) with P
            boundaries, as [`past_rates`] makes them; looked up by period and candidate, or period and user.
        label_settings (`dict`, *optional*): Of [`event_labels`] or [`session_labels`]: `watch_cap_ms`,
            `session_cap_ms`, ...
        args, kwargs: See [`OneRecCollator`].

    Batches hold `item_ids` (B, m, L), `item_mask` (B, m), `labels` (B, X) or (B, m, X), the context tensors and, where
    configured, `item_features` (B, m, F_i) and `item_numbers` (B, m, F_n), in the order of `item_feature_sizes` and
    `item_number_names`.
    """

    def __init__(
        self,
        *args,
        targets: Sequence[str],
        session_wise: bool,
        candidate_features: Mapping[str, np.ndarray] | None = None,
        request_features: Mapping[str, EventFeature] | None = None,
        boundaries: Sequence[float] = (),
        item_numbers: Mapping[str, np.ndarray] | None = None,
        user_numbers: Mapping[str, np.ndarray] | None = None,
        label_settings: Mapping | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.targets, self.session_wise, self.boundaries = tuple(targets), session_wise, np.asarray(boundaries)
        if not (np.diff(self.boundaries) > 0).all():
            raise ValueError(f"boundaries={list(boundaries)}: each must lie after the one before it.")
        self.label_settings = dict(label_settings or {})
        self.candidate_features = {name: np.asarray(values) for name, values in (candidate_features or {}).items()}
        self.request_features = {name: EventFeature(*feature) for name, feature in (request_features or {}).items()}
        if gaps := [name for name, feature in self.request_features.items() if feature.kind == "gap"]:
            raise ValueError(
                f"request features {gaps} are of kind 'gap': that is the time between the events of a history."
            )
        self.numbers = dict(item_numbers or {}), dict(user_numbers or {})
        for first, second in ((self.candidate_features, self.request_features), self.numbers):
            if both := sorted(set(first) & set(second)):
                raise ValueError(f"{both} are named twice, for items and for requests or users: rename one side.")
        self._check_shapes()
        sizes = {name: feature.size for name, feature in self.request_features.items()}
        sizes |= {name: int(values.max()) + 1 for name, values in self.candidate_features.items()}
        self.item_feature_sizes = dict(sorted(sizes.items()))
        self.item_number_names = sorted([*self.numbers[0], *self.numbers[1]])

    def _check_shapes(self):
        items, periods = len(self.item_token_ids), len(self.boundaries) + 1
        expected: dict[str, tuple[np.ndarray, tuple[int, ...]]]
        expected = {name: (values, (items,)) for name, values in self.candidate_features.items()}
        expected |= {name: (values, (periods, items)) for name, values in self.numbers[0].items()}
        expected |= {name: (values, (periods, values.shape[-1])) for name, values in self.numbers[1].items()}
        for name, (values, shape) in expected.items():
            if values.shape != shape:
                raise ValueError(
                    f"{name!r} has shape {values.shape}, expected {shape}: there are {items} items and, with the "
                    f"boundaries, {periods} periods."
                )

    def for_users(self, users: Mapping[str, Sequence], n: int) -> "RewardCollator":
        """As [`OneRecCollator.for_users`]; the past rates are those of the mean user, as the latest period knows
        them.
        """
        own = copy.copy(self)
        own.user_features = self.user_categories_of(users, n)
        items, known = self.numbers
        own.numbers = (
            items,
            {name: np.broadcast_to(v.mean(1, keepdims=True), (len(v), n)) for name, v in known.items()},
        )
        return own

    def _saved(self):
        """Also what is known of the training users: a reward model judges for them in reinforcement learning."""
        config, tables = super()._saved()
        config |= {
            "targets": list(self.targets),
            "session_wise": self.session_wise,
            "label_settings": self.label_settings,
        }
        config["boundaries"] = self.boundaries.tolist()
        config["request_features"] = {name: list(feature) for name, feature in self.request_features.items()}
        item_numbers, user_numbers = self.numbers
        tables |= {"candidate_features": self.candidate_features, "user_features": self.user_features}
        return config, tables | {"item_numbers": item_numbers, "user_numbers": user_numbers}

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return self.context(rows) | self.candidates(rows) | {"labels": self.labels(rows)}

    def events(self, row: dict, column: str = "history", prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """As [`OneRecCollator.events`], without what lies behind the last boundary before the row, unless that starts
        `NOW`.
        """
        items, codes = super().events(row, column, prefix)
        start = row["session_start"] if len(self.boundaries) else NOW
        period = 0 if start == NOW else int(period_of(np.asarray(start), self.boundaries))
        if period:
            known = np.searchsorted(event_column(row, f"{prefix}timestamp", column), self.boundaries[period - 1])
            items, codes = items[:known], codes[:known]
        return items, codes

    def candidates(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """`item_ids`, `item_mask`, `item_features`, `item_numbers` of `targets`: also of items that nobody was
        shown.
        """
        lengths = [len(row["targets"]) for row in rows]
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]  # (B, m)
        items = np.zeros(mask.shape, dtype=np.int64)
        items[mask] = np.concatenate([row["targets"] for row in rows])
        batch = {"item_ids": self.pad_targets([row["targets"] for row in rows]), "item_mask": torch.from_numpy(mask)}
        if self.item_feature_sizes:
            columns = [self._feature(name, rows, items, mask) for name in self.item_feature_sizes]
            batch["item_features"] = torch.from_numpy(np.stack(columns, axis=-1) * mask[..., None])
        if self.item_number_names:
            period = period_of(np.array([row["session_start"] for row in rows]), self.boundaries)[:, None]
            user = np.array([row["user"] for row in rows])[:, None]
            of_items, of_users = self.numbers
            columns = [
                of_items[name][period, items] if name in of_items else of_users[name][period, user] * mask
                for name in self.item_number_names
            ]
            batch["item_numbers"] = torch.from_numpy(np.stack(columns, axis=-1).astype(np.float32) * mask[..., None])
        return batch

    def _feature(self, name: str, rows: list[dict], items: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if name in self.candidate_features:
            return self.candidate_features[name][items].astype(np.int64)
        values = np.zeros(mask.shape, dtype=np.int64)
        columns = [event_column(row, f"target_{name}", "targets") for row in rows]
        values[mask] = self.request_features[name].encode(np.concatenate(columns), f"target_{name}")
        return values

    def labels(self, rows: list[dict]) -> torch.Tensor:
        """Targets in [0, 1], NaN where unknown or padding."""
        width, columns = max(len(row["targets"]) for row in rows), {}
        for name in rows[0]:
            if name.startswith("target_"):
                columns[name.removeprefix("target_")] = padded = np.full((len(rows), width), np.nan)
                for values, row in zip(padded, rows):
                    values[: len(row[name])] = row[name]
        make = session_labels if self.session_wise else event_labels
        return torch.from_numpy(make(columns, self.targets, **self.label_settings))
