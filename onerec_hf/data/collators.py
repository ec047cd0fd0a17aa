"""Rows of a split -> tensors of a OneRec model: context, features, and every target of a user in one pass.

OneRec-V2, section 2.2 (arXiv:2508.20900): an item's keys and values depend on that item alone, so one context serves all targets.
"""

from collections.abc import Mapping

import numpy as np
import torch

from .features import EventFeature


class OneRecCollator:
    r"""
    Makes batches from rows with `user`, `history` and, outside training, `targets`.

    Training rows (no `targets`): the history without its last item is the context, and each of its items but the first is a
    target that sees the items before it. Rows with `targets`: the whole history is the context of every target.

    Args:
        item_token_ids (`np.ndarray` of shape (N, L)): Token ids of every item, as `SemanticIdTokenizer.encode_semantic_ids`
            makes them.
        max_history (`int`): Items of context; older ones are dropped.
        event_features (`dict[str, EventFeature]`, *optional*): List columns of the rows that become context features.
        item_features (`dict[str, np.ndarray]`, *optional*): Categories of shape (N,), looked up for every context item.
        user_features (`dict[str, np.ndarray]`, *optional*): Categories of shape (U,), looked up by `user`.
        pad_token_id (`int`, defaults to 0).

    Batches hold `context_ids` (B, T, L), `context_mask` (B, T), `target_ids` (B, n, L), `target_positions` (B, n) and, where
    configured, `context_features` (B, T, F) and `user_features` (B, F_u), in the order of `context_feature_sizes`.
    """

    def __init__(
        self,
        item_token_ids: np.ndarray,
        max_history: int = 50,
        event_features: Mapping[str, EventFeature] | None = None,
        item_features: Mapping[str, np.ndarray] | None = None,
        user_features: Mapping[str, np.ndarray] | None = None,
        pad_token_id: int = 0,
    ):
        if max_history < 1:
            raise ValueError(f"max_history={max_history}: at least one item of context is needed.")
        self.item_token_ids = np.asarray(item_token_ids, dtype=np.int64)
        self.max_history, self.pad_token_id = max_history, pad_token_id
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

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if "targets" in rows[0]:
            batch = self.context(rows)
            targets = [np.asarray(row["targets"], dtype=np.int64) for row in rows]
            positions = [np.full(len(t), min(len(row["history"]), self.max_history)) for t, row in zip(targets, rows)]
        else:
            histories = [np.asarray(row["history"], dtype=np.int64)[-self.max_history - 1 :] for row in rows]
            batch = self.context(rows, drop_last=True)
            targets = [history[1:] for history in histories]
            positions = [np.arange(1, len(target) + 1) for target in targets]
        width = max(1, *(len(target) for target in targets))
        target_ids = np.full((len(rows), width, self.item_token_ids.shape[1]), self.pad_token_id)
        target_positions = np.zeros((len(rows), width), dtype=np.int64)
        for i, (target, position) in enumerate(zip(targets, positions)):
            target_ids[i, : len(target)] = self.item_token_ids[target]
            target_positions[i, : len(target)] = position
        batch["target_ids"] = torch.from_numpy(target_ids)
        batch["target_positions"] = torch.from_numpy(target_positions)
        return batch

    def context(self, rows: list[dict], drop_last: bool = False) -> dict[str, torch.Tensor]:
        """The context tensors alone, as `generate` takes them; `drop_last` leaves out each history's last item."""
        stop = -1 if drop_last else None
        window = slice(-self.max_history - drop_last, stop)
        histories = [np.asarray(row["history"], dtype=np.int64)[window] for row in rows]
        width = max(1, *(len(history) for history in histories))
        context_ids = np.full((len(rows), width, self.item_token_ids.shape[1]), self.pad_token_id)
        mask = np.zeros((len(rows), width), dtype=bool)
        features = np.zeros((len(rows), width, len(self.context_feature_sizes)), dtype=np.int64)
        for i, (row, history) in enumerate(zip(rows, histories)):
            size = len(history)
            context_ids[i, :size] = self.item_token_ids[history]
            mask[i, :size] = True
            for j, name in enumerate(self.context_feature_sizes):
                if name in self.event_features:
                    column = self.event_features[name].encode(self._column(row, name))[window]
                else:
                    column = self.item_features[name][history]
                features[i, :size, j] = column
        batch = {"context_ids": torch.from_numpy(context_ids), "context_mask": torch.from_numpy(mask)}
        if features.shape[2]:
            batch["context_features"] = torch.from_numpy(features)
        if self.user_features:
            users = np.array([row["user"] for row in rows])
            batch["user_features"] = torch.from_numpy(
                np.stack([v[users] for v in self.user_features.values()], axis=1)
            )
        return batch

    @staticmethod
    def _column(row: dict, name: str) -> np.ndarray:
        if name not in row:
            raise KeyError(
                f"the rows have no column {name!r} for the event feature of that name; they have {sorted(row)}."
            )
        if len(row[name]) != len(row["history"]):
            raise ValueError(
                f"column {name!r} has {len(row[name])} values, the history {len(row['history'])}: they run in parallel."
            )
        return np.asarray(row[name])
