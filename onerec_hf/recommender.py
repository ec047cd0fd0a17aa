"""A trained repository as a recommender: one's own item ids in, items with scores and metadata out."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModel
from transformers.utils.hub import cached_file

from .collators.histories import allowed_items, check_per_user, history_rows, refuse_arguments
from .collators.loading import collator_of
from .explanation import Contribution, leave_one_out
from .item_ranker import ItemRanker, judge_ids
from .models.input_checks import at_least
from .models.item_ids import id_array, is_text
from .recommendation_files import (
    METADATA_NAME,
    Recommendation,
    RecommendedSession,
    check_dataset,
    item_metadata,
    load_metadata,
    push_served,
    recommend_rows,
    save_parts,
    write_part,
)
from .reranker import CONFIG_NAME as RERANKER_NAME
from .reranker import Reranker
from .semantic_ids import RQVAE, ResidualKMeans, load_quantizer
from .semantic_ids.collisions import append_collision_level


class Recommender:
    r"""
    A trained repository as a recommender: histories of item ids in, item ids with scores and metadata out.

    Args:
        ranker ([`ItemRanker`]): Model and collator.
        metadata (`dict[item id, dict]`, *optional*): Returned with each item, and saved as JSON: numbers, text,
            booleans, lists and mappings of them. Dates become ISO text, NaN becomes None.
        quantizer ([`~semantic_ids.ResidualKMeans`] or [`~semantic_ids.RQVAE`], *optional*): The codebooks, for
            `add_items`.
    """

    def __init__(
        self, ranker: ItemRanker, metadata: Mapping | None = None, quantizer: ResidualKMeans | RQVAE | None = None
    ):
        self.ranker, self.quantizer = ranker, quantizer
        self.metadata = item_metadata(metadata or {})

    @property
    def model(self) -> Any:
        return self.ranker.model

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike,
        num_beams: int | Sequence[int] = 50,
        device: str | torch.device | None = None,
        cuda_graphs: bool | Mapping[str, Any] = False,
        **hub_kwargs,
    ) -> "Recommender":
        """
        Load a folder that `onerec sft` (or `dpo`, `grpo`) wrote, or a Hub repository.

        Args:
            num_beams: Width of the search, or one for each level of the codes: `[20, 50, 50]`.
            device: Where the model runs.
            cuda_graphs: Whether `model.capture()` is called, for searches as CUDA graphs; or its arguments.
            hub_kwargs: `revision`, `token`, `cache_dir`, ... as `from_pretrained` takes them.

        Raises:
            OSError: When there is no such model. ValueError: When it has no catalogue, or reads features and has no
                collator.
        """
        model = AutoModel.from_pretrained(repo, **hub_kwargs).eval().to(device)
        if cuda_graphs:
            model.capture(**({} if cuda_graphs is True else cuda_graphs))
        return cls.of_model(model, repo, num_beams, **hub_kwargs)

    @classmethod
    def of_model(
        cls, model: Any, repo: str | os.PathLike, num_beams: int | Sequence[int] = 50, **hub_kwargs
    ) -> "Recommender":
        """As `from_pretrained`, for a model that was loaded from `repo` already."""
        if getattr(model, "catalogue", None) is None:
            raise ValueError(f"{repo} holds no catalogue.safetensors, so there are no items to recommend.")
        places = [str(repo), model.config._name_or_path]  # of an adapter, the base may have it
        collator = collator_of(model, *dict.fromkeys(place for place in places if place), **hub_kwargs)
        metadata, quantizer = {}, None
        path = cached_file(str(repo), METADATA_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if path is not None:
            metadata = load_metadata(path)
        settings = "quantizer_config.json"
        path = cached_file(str(repo), settings, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if path is not None:
            cached_file(str(repo), "quantizer.safetensors", **hub_kwargs)
            quantizer = load_quantizer(Path(path).parent)
        path = cached_file(str(repo), RERANKER_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        reranker = None if path is None else Reranker.from_pretrained(repo, model, **hub_kwargs)
        return cls(ItemRanker(model, collator, num_beams, reranker), metadata, quantizer)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Model, catalogue, collator, codebooks, metadata and tokenizer."""
        self.model.save_pretrained(folder)
        self.save_beside(folder)

    def save_beside(self, folder: str | os.PathLike) -> None:
        """What a repository needs to be served, beside a model that is saved already: collator, codebooks, metadata,
        re-ranker. What another recommender left there, and this one does not have, is removed.
        """
        self.ranker.collator.save_pretrained(folder)
        save_parts(folder, self.quantizer, self.metadata, self.ranker.reranker)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        Pushes all that is served, in one commit, with the tokenizer; `kwargs` and result are those of
        `onerec_hf.hub.push_to_hub`.

        The card is the one beside the loaded model; without one, a short card that says what the model is.
        """
        return push_served(self, repo_id, **kwargs)

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
        session: bool = False,
        item_scorer: Any = None,
        num_candidates: int | None = None,
        rerank: bool = True,
        **unknown: Any,
    ) -> list[list[Any]]:
        """
        The `k` best items of each user, or, with `session=True`, the `k` best sessions, as OneRec writes them.

        Args:
            histories: Per user the ids of the items, oldest first; may be empty. What exceeds the model's length is
                cut off, oldest first.
            k: Items, or sessions, per user; fewer come back where fewer are allowed or exist.
            exclude_seen: Leave out the items of the history.
            allow, deny: Item ids that alone may, or that may not, be recommended: one list for all users, or one per
                user (None: this user has no such filter).
            events: Event columns that the model takes beside the ids (`play_time_ms`, ...), parallel to `histories`; a
                column that is left out counts as unknown.
            users: User features, one value per user: as they stand in `users.parquet` where the repository knows its
                values, else categories. What is left out, or not among the known values, is unknown (0).
            unknown_items: What to do with ids of a history that the catalogue does not have; `"ignore"` drops them.
            session: Whole sessions of `num_session_items` different items, in order, each with one score; of a OneRec
                model.
            item_scorer: Ranks what the search found: a [`~rewards.RewardModel`], or a function `(histories, items)`
                of ids that returns a number for each item (with `session`, for each user's sessions one number each).
                Its numbers are the scores that come back.
            num_candidates: How many items (or sessions) `item_scorer` judges, the best of the search; default all it
                finds.
            rerank: Whether the re-ranker that is saved with the model, if there is one, orders the items; their score
                is then its sum instead of the log-probability. Not with `session`, `item_scorer`.

        Returns:
            Per user a list of [`Recommendation`], best first, or of [`RecommendedSession`].

        Raises:
            TypeError: An argument of another name, such as `generate`'s `allowed_items`; the message names ours.
            KeyError: Unknown item ids. ValueError: `k` below 1, a session of a model that writes single items, columns
                or lists that do not run parallel to `histories`, a category that the model does not have, a model in
                training mode.
        """
        refuse_arguments(unknown)
        catalogue, n = self.model.catalogue, len(histories)
        if k < 1 or k != int(k):
            raise ValueError(f"k={k}: a whole number, at least one item per user.")
        if num_candidates is not None and (item_scorer is None or num_candidates < k):
            need = "an item_scorer, which judges them" if item_scorer is None else "at least as many as come back"
            raise ValueError(f"num_candidates={num_candidates} with k={k}: it needs {need}.")
        if session and not self.model.config.session_wise:
            raise ValueError(
                f"session=True: {type(self.model).__name__} writes single items. Sessions come from a OneRec model, "
                'trained with `--model \'{"model_type": "onerec", ...}\'`.'
            )
        check_per_user(n, events=events, users=users, allow=allow, deny=deny)
        if not n:
            return []
        collator = self.ranker.collator.for_users(users or {}, n)
        rows = history_rows(catalogue, collator, histories, events or {}, unknown_items)
        allowed = allowed_items(catalogue, [row["history"] for row in rows], exclude_seen, allow, deny)
        k = k if session else min(k, catalogue.num_items)
        widths = at_least(self.ranker.num_beams, max(num_candidates or 1, k))
        width = widths[-1] if isinstance(widths, list) else widths
        length = self.model.num_session_items if session else None
        reranker = None if session or item_scorer is not None or not rerank else self.ranker.reranker
        judge = None
        if item_scorer is not None:
            judge = judge_ids(item_scorer, catalogue, rows, events or {}, users or {}, num_candidates)
        context = {name: tensor.to(self.model.device) for name, tensor in collator.context(rows).items()}
        if reranker is not None and reranker.item_head:
            context = {"context_kv": self.model.encode_context(**context)}
        found = self.model.recommend_items(
            k if reranker is None else width,
            num_beams=widths,
            allowed_items=allowed,
            num_session_items=length,
            item_scorer=judge,
            **context,
        )
        if reranker is not None:
            kind = "masked" if exclude_seen else "kept"
            head = self.model.score_items(**context) if reranker.item_head else None
            found = reranker(found, [row["history"] for row in rows], catalogue, k, kind, allowed, head)
        items, scores = found
        ids = catalogue.item_ids[items.cpu().clamp(min=0).numpy()].tolist()
        ranked = [[(i, s) for i, s in zip(*row) if s > float("-inf")] for row in zip(ids, scores.tolist())]
        known = self.metadata
        if session:
            return [[RecommendedSession(i, s, [known.get(item, {}) for item in i]) for i, s in row] for row in ranked]
        return [[Recommendation(i, s, known.get(i, {})) for i, s in row] for row in ranked]

    def add_items(
        self,
        item_ids: Sequence,
        embeddings: np.ndarray,
        metadata: Sequence[Mapping] | None = None,
        popularity: Sequence[float] | None = None,
    ) -> None:
        """
        New items join the catalogue without training: they get the nearest codes of the old codebooks. Not saved until
        `save_pretrained`.

        Args:
            item_ids: Ids that the catalogue does not have yet.
            embeddings (`np.ndarray` of shape (M, D)): From the embedding model that the codebooks were fitted on.
            metadata: One mapping per item.
            popularity: Training events of each item, where the catalogue counts them; default 0.

        Raises:
            ValueError: Without codebooks, for a model with item features, for embeddings of another width or with NaN,
                and where a collision level has no code left.
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
            old = catalogue.semantic_ids.cpu().numpy()
            codes = append_collision_level(codes, old, self.model.config.codebook_sizes[-1])
        new_ids = id_array(item_ids)
        if len(new_ids) != len(codes) or len(metadata or codes) != len(codes):
            given = f"{len(new_ids)} item ids, {len(codes)} embeddings, {len(metadata or codes)} metadata"
            raise ValueError(f"{given}: one each per item.")
        added = item_metadata(dict(zip(new_ids.tolist(), metadata or [{}] * len(codes))))
        counts = None
        if catalogue.popularity is not None:
            counts = np.zeros(len(codes)) if popularity is None else np.asarray(popularity)
        self.model.catalogue = catalogue.with_items(codes, new_ids, counts)
        tokens = self.model.catalogue.semantic_ids.cpu().numpy() + np.array(self.model.config.level_offsets)
        collator.item_token_ids = tokens.astype(np.int64)
        self.metadata |= added
        if self.ranker.reranker is not None:
            self.ranker.reranker.follow(np.arange(len(catalogue)), len(codes))

    def remove_items(self, item_ids: Sequence) -> None:
        """
        Items leave the catalogue, and histories may not hold them any more (`unknown_items="ignore"` drops them
        there).

        Item indices close up, so let no other thread recommend meanwhile; `deny` leaves items out without a change.

        Raises:
            KeyError: Ids that the catalogue does not have. ValueError: Where no item would be left.
        """
        catalogue, collator = self.model.catalogue, copy.copy(self.ranker.collator)
        kept = np.setdiff1d(np.arange(len(catalogue)), catalogue.index_of(item_ids))
        smaller = catalogue.without_items(item_ids)
        collator.item_token_ids = collator.item_token_ids[kept]
        collator.item_features = {name: values[kept] for name, values in collator.item_features.items()}
        self.model.catalogue, self.ranker.collator = smaller, collator
        if self.ranker.reranker is not None:
            self.ranker.reranker.follow(kept)
        left = set(id_array(item_ids).tolist())
        self.metadata = {item: row for item, row in self.metadata.items() if item not in left}

    def explain(
        self,
        history: Sequence,
        item: Any,
        *,
        events: Mapping[str, Sequence] | None = None,
        users: Mapping[str, Any] | None = None,
    ) -> list[Contribution]:
        """
        What each item of one history adds to the score of an item: the score of the history, minus the score without
        it.

        Args:
            history: Item ids, oldest first.
            item: The id of the item that is explained, recommended or not.
            events, users: Of this one user, as in `recommend`: a list parallel to the history, a single value.

        Returns:
            One [`Contribution`] per item that the model reads, oldest first; positive where it speaks for the item, in
            nats. `pandas.DataFrame(found)` is a table of them, [`~explanation.plot_explanation`] a picture.

        Raises:
            KeyError: Unknown item ids. ValueError: An empty history, columns that do not run parallel to it.
        """
        return leave_one_out(self, history, item, events or {}, users or {})

    def recommend_dataset(
        self,
        dataset: Any,
        output: str | os.PathLike,
        k: int = 10,
        *,
        column: str = "history",
        batch_size: int = 256,
        overwrite: bool = False,
        session: bool = False,
        **kwargs,
    ) -> Path:
        """
        Recommendations for every row of a `datasets.Dataset`, written as parquet: its columns, and `item_ids` and
        `scores`; with `session=True` a list of item ids for each session.

        Under `accelerate launch` (or torchrun) each process takes its own rows, each row exactly once, and writes its
        own file.

        Args:
            dataset: With a list column of item ids, oldest first. Event columns and user features that the model
                reads come from its columns of these names; those that are absent are unknown.
            output: Folder; process r of w writes `part-<r>-of-<w>.parquet`, complete or not at all; without rows, an
                empty one.
            overwrite: Replace the parts of an earlier run.
            kwargs: As `recommend`, but for `events` and `users`.

        Raises:
            ValueError: Before the first search: a column that is missing or in the way, a folder with parts of another
                run.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        path = Path(output) / f"part-{rank:05d}-of-{world:05d}.parquet"
        check_dataset(dataset, column, path, overwrite)
        own = dataset.select(range(len(dataset) * rank // world, len(dataset) * (rank + 1) // world))
        item_ids, scores = recommend_rows(self, own, k, column, batch_size, session=session, **kwargs)
        write_part(path, own, item_ids, scores, is_text(self.model.catalogue.item_ids), session)
        return path


__all__ = ["Contribution", "ItemRanker", "Recommendation", "RecommendedSession", "Recommender"]
