"""Recommendations from a trained model through `model.generate` and nothing else: for evaluation, and for one's own item ids."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel
from transformers.utils.hub import cached_file

from .data.collators import OneRecCollator
from .data.saved import load_collator, save_collator
from .semantic_ids import RQVAE, ResidualKMeans, load_quantizer

METADATA_NAME = "items.jsonl"


class ItemRanker:
    r"""
    A generative model with the call that `evaluate` and every baseline share: rows of item indices in, item indices out.

    Args:
        model: A OneRec model with a catalogue.
        collator (`OneRecCollator`): As in training; its `context` makes the model's inputs.
        num_beams (`int`, defaults to 50): Beam width; at least the number of items asked for.
    """

    def __init__(self, model: Any, collator: OneRecCollator, num_beams: int = 50):
        if model.catalogue is None:
            raise ValueError("the model has no catalogue: set `model.catalogue`, or load it from a folder with one.")
        self.model, self.collator, self.num_beams = model, collator, num_beams

    def recommend(self, examples: dict[str, list], k: int, exclude_seen: bool = False) -> np.ndarray:
        """
        The `k` best items of each user.

        Args:
            examples: Columns of a split (`user`, `history`, ...), B rows.
            k: Items per user, at most `num_beams`.
            exclude_seen: Keep the items of the history out of the search.

        Returns:
            `np.ndarray` of shape (B, k), int64: item indices, best first, -1 where fewer items exist.
        """
        if k > self.num_beams:
            raise ValueError(f"k={k} items need num_beams of at least {k}, it is {self.num_beams}.")
        rows = [dict(zip(examples, values)) for values in zip(*examples.values())]
        allowed = None
        if exclude_seen:
            allowed = torch.ones(len(rows), self.model.catalogue.num_items, dtype=torch.bool)
            for i, row in enumerate(rows):
                allowed[i, np.asarray(row["history"], dtype=np.int64)] = False
        return self.search(rows, k, allowed)[0].cpu().numpy()

    def search(
        self, rows: list[dict], k: int, allowed: torch.Tensor | None = None, num_beams: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items (B, k) and the log-probabilities (B, k), in nats, of the semantic IDs they carry; -1 and -inf for none."""
        model, catalogue, width = self.model, self.model.catalogue, num_beams or self.num_beams
        batch = {name: tensor.to(model.device) for name, tensor in self.collator.context(rows).items()}
        was_training = model.training
        model.eval()
        found = model.generate(  # of a session, its first item
            **batch,
            num_beams=width,
            num_return_sequences=width,
            num_items=1,
            allowed_items=allowed,
            return_dict_in_generate=True,
        )
        model.train(was_training)
        codes = found.sequences[:, 1:] - torch.tensor(model.config.level_offsets, device=model.device)
        leaves = catalogue.leaves_of(codes).view(len(rows), width)
        items = catalogue.items_of(leaves, k, allowed=allowed)  # (B, k)
        scores = found.sequences_scores.view(len(rows), width) * catalogue.num_levels
        own = catalogue.leaves_of(catalogue.semantic_ids[items.clamp(min=0)].flatten(0, 1).long()).view(items.shape)
        place = (own.unsqueeze(2) == leaves.unsqueeze(1)).int().argmax(2)  # the beam that an item came from
        return items, scores.gather(1, place).masked_fill(items < 0, float("-inf"))


class Recommendation(NamedTuple):
    """One item: its id, the natural log-probability of its semantic ID, and what the repository knows about it."""

    item_id: Any
    score: float
    metadata: dict


class Recommender:
    r"""
    A trained repository as a recommender: histories of item ids in, item ids with scores and metadata out.

    Args:
        ranker ([`ItemRanker`]): Model and collator.
        metadata (`dict[item id, dict]`, *optional*): Returned with each item.
        quantizer ([`~semantic_ids.ResidualKMeans`] or [`~semantic_ids.RQVAE`], *optional*): The codebooks, for `add_items`.
    """

    def __init__(
        self, ranker: ItemRanker, metadata: Mapping | None = None, quantizer: ResidualKMeans | RQVAE | None = None
    ):
        self.ranker, self.metadata, self.quantizer = ranker, dict(metadata or {}), quantizer

    @property
    def model(self) -> Any:
        return self.ranker.model

    @classmethod
    def from_pretrained(
        cls, repo: str | os.PathLike, num_beams: int = 50, device: str | torch.device | None = None, **hub_kwargs
    ) -> "Recommender":
        """
        Load a folder that `recipes/sft.py` (or an alignment recipe) wrote, or a Hub repository.

        Args:
            num_beams: Width of the search.
            device: Where the model runs.
            hub_kwargs: `revision`, `token`, `cache_dir`, ... as `from_pretrained` takes them.

        Raises:
            OSError: When there is no such model, or no collator beside it. ValueError: When it has no catalogue.
        """
        model = AutoModel.from_pretrained(repo, **hub_kwargs).eval().to(device)
        return cls.of_model(model, repo, num_beams, **hub_kwargs)

    @classmethod
    def of_model(cls, model: Any, repo: str | os.PathLike, num_beams: int = 50, **hub_kwargs) -> "Recommender":
        """As `from_pretrained`, for a model that was loaded from `repo` already."""
        if getattr(model, "catalogue", None) is None:
            raise ValueError(f"{repo} holds no catalogue.safetensors, so there are no items to recommend.")
        tokens = model.catalogue.semantic_ids.cpu().numpy() + np.array(model.config.level_offsets)
        collator = load_collator(repo, tokens, **hub_kwargs)
        metadata, quantizer = {}, None
        path = cached_file(str(repo), METADATA_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if path is not None:
            rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
            metadata = {row.pop("item_id"): row for row in rows}
        path = cached_file(
            str(repo), "quantizer_config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs
        )
        if path is not None:
            cached_file(str(repo), "quantizer.safetensors", **hub_kwargs)
            quantizer = load_quantizer(Path(path).parent)
        return cls(ItemRanker(model, collator, num_beams), metadata, quantizer)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Model, catalogue, collator, codebooks and metadata; the tokenizer is saved by itself."""
        self.model.save_pretrained(folder)
        self.save_beside(folder)

    def save_beside(self, folder: str | os.PathLike) -> None:
        """What a repository needs to be served, beside a model that is saved already: collator, codebooks, metadata."""
        save_collator(self.ranker.collator, folder)
        if self.quantizer is not None:
            self.quantizer.save_pretrained(folder)
        if self.metadata:
            lines = [json.dumps({"item_id": item, **row}, ensure_ascii=False) for item, row in self.metadata.items()]
            (Path(folder) / METADATA_NAME).write_text("\n".join(lines) + "\n")

    def recommend(
        self,
        histories: Sequence[Sequence],
        k: int = 10,
        *,
        exclude_seen: bool = False,
        allow: Sequence | None = None,
        deny: Sequence | None = None,
        events: Mapping[str, Sequence[Sequence]] | None = None,
        users: Mapping[str, Sequence[int]] | None = None,
        unknown_items: Literal["error", "ignore"] = "error",
    ) -> list[list[Recommendation]]:
        """
        The `k` best items of each user.

        Args:
            histories: Per user the ids of the items, oldest first; may be empty. What exceeds the model's length is cut off, oldest
                first.
            k: Items per user; fewer come back where fewer are allowed or exist.
            exclude_seen: Leave out the items of the history.
            allow, deny: Item ids that alone may, or that may not, be recommended: one list for all users, or one per user.
            events: Event columns that the model takes beside the ids (`play_time_ms`, ...), parallel to `histories`; a column that
                is left out counts as unknown.
            users: Categories of the user features, one value per user; left out: unknown (0).
            unknown_items: What to do with ids of a history that the catalogue does not have; `"ignore"` drops them.

        Raises:
            KeyError: Unknown item ids. ValueError: `k` below 1, or columns that do not run parallel.
        """
        catalogue, n = self.model.catalogue, len(histories)
        if k < 1 or k != int(k):
            raise ValueError(f"k={k}: a whole number, at least one item per user.")
        if unknown_items not in ("error", "ignore"):
            raise ValueError(f"unknown_items={unknown_items!r}: allowed are 'error' and 'ignore'.")
        if not n:
            return []
        rows, collator = self._rows(histories, events or {}, unknown_items), copy.copy(self.ranker.collator)
        sizes = collator.user_feature_sizes
        if wrong := [name for name, values in (users or {}).items() if name not in sizes or len(values) != n]:
            raise ValueError(
                f"users[{wrong[0]!r}]: the model takes {sorted(sizes)}, one value for each of the {n} users."
            )
        collator.user_features = {name: np.asarray((users or {}).get(name, np.zeros(n, int))) for name in sizes}
        allowed = self._allowed([row["history"] for row in rows], exclude_seen, allow, deny)
        k = min(k, catalogue.num_items)
        width = max(self.ranker.num_beams, k)
        items, scores = ItemRanker(self.model, collator, width).search(rows, k, allowed)
        ids = catalogue.item_ids[items.cpu().clamp(min=0).numpy()].tolist()
        return [
            [Recommendation(i, s, self.metadata.get(i, {})) for i, s in zip(*row) if s > float("-inf")]
            for row in zip(ids, scores.tolist())
        ]

    def _rows(self, histories, events, unknown_items) -> list[dict]:
        """Rows as the collator takes them: item indices, and every event column it reads, unknown where it is not given."""
        catalogue, collator = self.model.catalogue, self.ranker.collator
        columns = {*collator.event_features, *collator.settings.get("positive", ())}
        if unknown := sorted(set(events) - columns):
            raise ValueError(f"events has columns {unknown}; the model takes {sorted(columns)}.")
        rows = []
        for i, given in enumerate(histories):
            history = np.asarray(given)
            if history.ndim != 1:
                raise ValueError(f"histories[{i}] is {given!r}: a list of item ids per user, also for a single user.")
            absent = np.full(len(history), np.nan)
            own = {name: np.asarray(events[name][i], float) if name in events else absent for name in columns}
            if odd := [name for name, values in own.items() if len(values) != len(history)]:
                raise ValueError(
                    f"events[{odd[0]!r}][{i}] has {len(own[odd[0]])} values, the history {len(history)} items."
                )
            if unknown_items == "ignore" and len(history):
                known = np.isin(history.astype(catalogue.item_ids.dtype), catalogue.item_ids)
                history, own = history[known], {name: values[known] for name, values in own.items()}
            row = {"user": i, "history": catalogue.index_of(history), **own}
            if collator.settings.get("lifelong") == "lifelong":  # not compressed: the history as it is
                row |= {"lifelong": row["history"]} | {f"lifelong_{name}": values for name, values in own.items()}
            rows.append(row)
        return rows

    def _allowed(self, seen, exclude_seen, allow, deny) -> torch.Tensor | None:
        if not exclude_seen and allow is None and deny is None:
            return None
        catalogue = self.model.catalogue
        mask = np.full((len(seen), catalogue.num_items), allow is None)
        for ids, value in ((allow, True), (deny, False)):
            if ids is None:
                continue
            each = len(ids) and isinstance(ids[0], (list, tuple, np.ndarray))
            if each and len(ids) != len(seen):
                raise ValueError(
                    f"allow or deny has {len(ids)} lists for {len(seen)} users: one list for all, or one each."
                )
            for row, own in zip(mask, ids) if each else ((mask.T, ids),):
                row[catalogue.index_of(own)] = value
        for row, items in zip(mask, seen if exclude_seen else ()):
            row[items] = False
        return torch.from_numpy(mask).to(self.model.device)

    def add_items(self, item_ids: Sequence, embeddings: np.ndarray, metadata: Sequence[Mapping] | None = None) -> None:
        """
        New items join the catalogue without training: they get the nearest codes of the old codebooks. Not saved until
        `save_pretrained`.

        Args:
            item_ids: Ids that the catalogue does not have yet.
            embeddings (`np.ndarray` of shape (M, D)): From the embedding model that the codebooks were fitted on.
            metadata: One mapping per item.

        Raises:
            ValueError: Without codebooks, for a model with item features, for embeddings of another width or with NaN, and where a
                collision level has no code left.
        """
        catalogue, collator = self.model.catalogue, self.ranker.collator
        if self.quantizer is None:
            raise ValueError(
                "this repository has no codebooks (quantizer_config.json): save those of prepare.py with it."
            )
        if collator.item_features:
            raise ValueError(
                f"the model reads item features {sorted(collator.item_features)}, which new items do not have here."
            )
        codes = self.quantizer.encode(torch.as_tensor(np.asarray(embeddings, dtype=np.float32))).numpy()
        if catalogue.num_levels > codes.shape[1]:
            codes = self._with_collision_level(codes)
        popularity = None if catalogue.popularity is None else np.zeros(len(codes))
        self.model.catalogue = catalogue.with_items(codes, item_ids, popularity)
        tokens = self.model.catalogue.semantic_ids.cpu().numpy() + np.array(self.model.config.level_offsets)
        collator.item_token_ids = tokens.astype(np.int64)
        self.metadata |= dict(zip(item_ids, metadata or [{}] * len(codes)))

    def _with_collision_level(self, codes: np.ndarray) -> np.ndarray:
        """The number of each new item inside the group of items with its codes, behind those that are there."""
        old = self.model.catalogue.semantic_ids.cpu().numpy()
        taken: dict[tuple, int] = {}
        for row in old:
            taken[tuple(row[:-1])] = max(taken.get(tuple(row[:-1]), -1), int(row[-1]))
        last = []
        for row in map(tuple, codes):
            taken[row] = taken.get(row, -1) + 1
            last.append(taken[row])
        size = self.model.config.codebook_sizes[-1]
        if max(last) >= size:
            full = sum(n >= size for n in last)
            raise ValueError(f"{full} new items have codes whose {size} places are all taken: fit the codebooks anew.")
        return np.concatenate([codes, np.array(last)[:, None]], axis=1)

    def recommend_dataset(
        self,
        dataset: Any,
        output: str | os.PathLike,
        k: int = 10,
        *,
        column: str = "history",
        batch_size: int = 256,
        **kwargs,
    ) -> Path:
        """
        Recommendations for every row of a `datasets.Dataset`, written as parquet: its columns, and `item_ids` and `scores`.

        Under `accelerate launch` (or torchrun) each process takes its own rows, each row exactly once, and writes its own file.

        Args:
            dataset: With a list column of item ids, oldest first.
            output: Folder; the file of process r is `part-<r>.parquet`, complete or not there at all.
            kwargs: As `recommend`, but for `events` and `users`.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if column not in dataset.column_names:
            raise ValueError(f"the dataset has no column {column!r}; it has {dataset.column_names}.")
        if stale := [file.name for file in Path(output).glob("part-*.parquet") if int(file.stem[5:]) >= world]:
            raise ValueError(
                f"{output} holds {sorted(stale)} of a run on more processes, with the same rows: remove them."
            )
        own = dataset.shard(world, rank, contiguous=True)
        Path(output).mkdir(parents=True, exist_ok=True)  # before hours of work, if it may not be written
        item_ids, scores = [], []
        for start in tqdm(range(0, len(own), batch_size), desc="recommend", disable=rank > 0):
            for row in self.recommend(own[start : start + batch_size][column], k, **kwargs):
                item_ids.append([found.item_id for found in row])
                scores.append([found.score for found in row])
        path = Path(output) / f"part-{rank:05d}.parquet"
        partial = path.with_suffix(".partial")
        own.add_column("item_ids", item_ids).add_column("scores", scores).to_parquet(str(partial))
        partial.replace(path)
        return path
