"""Re-ranking: several scorers judge what the search and they themselves propose; a fitted linear model orders it.

Models of semantic IDs, models of item ids and counts find different items, so that their sum ranks better than each
(EnsRec, arXiv:2512.17820). Shapes: **B** users, **C** candidates, **F** features, **N** items.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.hub import cached_file

from . import baselines
from .models import RecommendedItems
from .models.catalogue import Catalogue

CONFIG_NAME, FOLDER, VALUES_NAME = "reranker.json", "scorers", "item_values.safetensors"
FILES = ("config.json", "model.safetensors")  # of a scorer
CODES, ITEM_HEAD, ITEM_VECTORS, VALUE = "codes", "item head", "item vectors", "value"
KINDS = ("kept", "masked")  # weights where seen items may come back, and where they may not


def item_neighbours(model: Any) -> baselines.EmbeddingKNN | None:
    """Neighbours of the last two items by the given vectors that an OneRec-V2 reads (`item_vectors`), as a scorer
    that has no files of its own; None for a model that reads none.
    """
    config = model.config
    if config.model_type != "onerec_v2" or "item_vectors" not in config.fixed_context_features:
        return None
    table = model.model.context_processor.embed_features.tables[list(config.context_features).index("item_vectors")]
    return baselines.EmbeddingKNN(table.weight[1:].float().cpu().numpy())  # row 0 is "unknown"


class Reranker:
    r"""
    Orders candidates by a weighted sum of scores.

    The candidates of a user are the items of the beam and the `num_candidates` best of each scorer. Each has these
    features: log p of its semantic ID (of the beam's worst item where the beam does not have it) and a flag for that;
    of each scorer the log-probability among all items; of each of these also the probability as a share of the best
    candidate's, since a logarithm makes little of the difference between good ones; log(1 + training events), and
    whether the history has the item. With `item_values` also the logarithm of the item's value, whose weight is not
    fitted: a sum with weight 1 orders by p times value, the value that is expected, where the others' sum is log p.

    Args:
        scorers: By name, each with `score_items(examples)`: for the columns of a split, log-probabilities (B, N),
            `-inf` where an item can't be scored. Baselines have it.
        weights (`dict`, *optional*): By kind (`"kept"`, `"masked"`), a weight per feature; `fit` makes it.
        num_candidates (`int`, defaults to 50): What each scorer adds to the candidates.
        item_head (`bool`, defaults to `False`): The item head of the model is a scorer, too.
        search (`bool`, defaults to `True`): A model's search proposes and judges. False: the scorers alone, what a
            re-ranked model must be compared with.
        item_values (`torch.FloatTensor` of shape (N,), *optional*): What each item is worth once it is chosen, above
            0, such as its mean watch time.
    """

    def __init__(
        self,
        scorers: Mapping[str, Any],
        weights: Mapping[str, Mapping[str, float]] | None = None,
        num_candidates: int = 50,
        item_head: bool = False,
        search: bool = True,
        item_values: torch.Tensor | None = None,
    ):
        if without := [name for name, scorer in scorers.items() if not hasattr(scorer, "score_items")]:
            raise TypeError(f"the scorers {without} have no `score_items(examples)`; `onerec_hf.baselines` have it.")
        if num_candidates < 1:
            raise ValueError(f"num_candidates={num_candidates}: at least 1.")
        self.scorers, self.num_candidates = dict(scorers), num_candidates
        if item_values is not None:
            item_values = item_values.float().contiguous()
            if not bool(((item_values > 0) & item_values.isfinite()).all()):
                raise ValueError("item_values has values that are not above 0: their logarithm is a feature.")
        self.item_head, self.search, self.item_values = item_head, search, item_values
        self.mean_log_value = (
            torch.zeros(()) if item_values is None else item_values.log().mean()
        )  # once, not per request
        self.positions: torch.Tensor | None = None  # (N,) the scorers' index of each item; None: the same
        self.parts = (*([CODES] if search else []), *([ITEM_HEAD] if item_head else []), *self.scorers)
        if not self.parts:
            raise ValueError("without a search and an item head there must be scorers.")
        best = (f"{part}, of the best" for part in self.parts)
        self.features = (*self.parts, *best, *(["not in the beam"] if search else []), "popularity", "seen")
        self.features += (VALUE,) if item_values is not None else ()
        self.weights = {kind: dict(own) for kind, own in (weights or {}).items()}
        for kind, own in self.weights.items():
            if kind not in KINDS or set(own) != set(self.features):
                raise ValueError(f"weights[{kind!r}] has {sorted(own)}, the features are {list(self.features)}.")

    def candidates(
        self,
        found: RecommendedItems | None,
        histories: Sequence[Sequence[int]],
        catalogue: Catalogue,
        allowed_items: torch.Tensor | None = None,
        head_scores: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What may be recommended, and what speaks for it.

        Args:
            found: The beam's items and scores, (B, K); None for the scorers alone.
            histories: Item indices of the catalogue, one list per user.
            allowed_items (`torch.BoolTensor` of shape (B or 1, N), *optional*): Items a user may get.
            head_scores (`torch.FloatTensor` of shape (B, N), *optional*): Of the model's item head.

        Returns:
            Item indices (B, C), -1 where a row has fewer, each item once; and features (B, C, F).
        """
        if (found is not None) != self.search:
            raise ValueError(f"found={found}, and this re-ranker has search={self.search}: one goes with the other.")
        if self.item_values is not None and self.positions is None and len(self.item_values) != len(catalogue):
            raise ValueError(f"{len(self.item_values)} item_values, {len(catalogue)} items: one for each is needed.")
        scores = self._scores(histories, head_scores)
        columns = [] if found is None else [found.items.cpu()]
        forbidden = None if allowed_items is None else ~allowed_items.cpu()
        for own in scores.values():
            own = own if forbidden is None else own.masked_fill(forbidden, -torch.inf)
            best = own.topk(min(self.num_candidates, own.shape[1]))
            columns.append(best.indices.masked_fill(best.values == -torch.inf, -1))
        items = _once(torch.cat(columns, dim=1))
        known = items.clamp(min=0)
        parts, flags = [], []
        if found is not None:
            beam, log_probs = columns[0], found.scores.float().cpu()
            in_beam = (items[:, :, None] == beam[:, None, :]) & (items >= 0)[:, :, None]  # (B, C, K)
            worst = log_probs.masked_fill(beam < 0, torch.inf).amin(1, keepdim=True)
            parts = [torch.where(in_beam.any(2), log_probs.gather(1, in_beam.int().argmax(2)), worst)]
            flags = [(~in_beam.any(2)).float()]
        past = pad_sequence([torch.as_tensor(list(own), dtype=torch.long) for own in histories], True, -2)
        seen = (items[:, :, None] == past[:, None, :]).any(2)
        counts = catalogue.popularity
        popularity = torch.zeros(known.shape) if counts is None else torch.as_tensor(counts)[known].float().log1p()
        parts += [own.gather(1, known).clamp(min=_FLOOR) for own in scores.values()]
        parts = [part.nan_to_num(neginf=_FLOOR).masked_fill(items < 0, _FLOOR) for part in parts]
        relative = [(part - part.amax(1, keepdim=True)).exp() for part in parts]
        values = [] if self.item_values is None else [self._log_values(known)]
        return items, torch.stack([*parts, *relative, *flags, popularity, seen.float(), *values], dim=2)

    def __call__(
        self,
        found: RecommendedItems,
        histories: Sequence[Sequence[int]],
        catalogue: Catalogue,
        k: int,
        kind: str,
        allowed_items: torch.Tensor | None = None,
        head_scores: torch.Tensor | None = None,
    ) -> RecommendedItems:
        """The `k` best candidates of each user; arguments as in `candidates` and `rank`."""
        return self.rank(*self.candidates(found, histories, catalogue, allowed_items, head_scores), k, kind)

    def _scores(self, histories: Sequence[Sequence[int]], head_scores: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Of each scorer log-probabilities (B, N), `-inf` for items that it does not know."""
        positions, known = self.positions, [list(history) for history in histories]
        if positions is not None:
            known = [own[own >= 0].tolist() for own in (positions[history] for history in known)]
        every = {name: scorer.score_items({"history": known}) for name, scorer in self.scorers.items()}
        if self.item_head:
            if head_scores is None:
                raise ValueError("this re-ranker was fitted with the model's item head: pass `head_scores`.")
            every = {ITEM_HEAD: head_scores} | every
        scores = {}
        for name, own in every.items():
            scores[name] = own.float().cpu()
            if positions is not None:  # behind the last item stands what -1 points at
                scores[name] = torch.nn.functional.pad(scores[name], (0, 1), value=-torch.inf)[:, positions]
        return scores

    def _log_values(self, items: torch.Tensor) -> torch.Tensor:
        """Of items (B, C) of the catalogue; the mean where the value of an item is not known."""
        assert self.item_values is not None
        if self.positions is None:
            return self.item_values[items].log()
        known = self.positions[items]
        return self.item_values[known].log().where(known >= 0, self.mean_log_value)

    def follow(self, kept: np.ndarray, num_new: int = 0) -> None:
        """The catalogue keeps the items `kept` (indices), and gets `num_new` behind them that no scorer knows."""
        positions = torch.arange(int(kept.max()) + 1) if self.positions is None else self.positions
        self.positions = torch.cat([positions[torch.as_tensor(kept)], torch.full((num_new,), -1)])

    def rank(self, items: torch.Tensor, features: torch.Tensor, k: int, kind: str) -> RecommendedItems:
        """
        The `k` best candidates by the fitted weights.

        Args:
            items, features: Of `candidates`, (B, C) and (B, C, F).
            kind: Of the weights, `"kept"` or `"masked"`.

        Returns:
            Items and their sums, (B, k); -1 and `-inf` where there are fewer candidates.

        Raises:
            ValueError: Without weights of this kind.
        """
        if kind not in self.weights:
            raise ValueError(f"the re-ranker has no weights {kind!r} yet: call `fit`.")
        own = self.weights[kind]
        weights = torch.tensor([own[name] for name in self.features])
        scores = (features @ weights).masked_fill(items < 0, -torch.inf)
        order = scores.topk(min(k, scores.shape[1])).indices
        items, scores = items.gather(1, order), scores.gather(1, order)
        missing = (0, k - order.shape[1])
        return RecommendedItems(
            torch.nn.functional.pad(items, missing, value=-1),
            torch.nn.functional.pad(scores, missing, value=-torch.inf),
        )

    def fit(
        self, items: torch.Tensor, features: torch.Tensor, targets: Sequence[Sequence[int]], kind: str
    ) -> dict[str, float]:
        """
        Weights by a listwise softmax: the mean log-probability of a user's targets among the candidates, maximised by
        L-BFGS. It is convex, so nothing is drawn at random. Users none of whose targets is a candidate teach nothing.
        The weight of the items' value is 0 afterwards: it is a choice, `weights[kind]["value"]`.

        Args:
            items, features: Of `candidates`, of users on whom no scorer was trained.
            targets: Item indices that each user chose next.

        Returns:
            The weights, by feature; they are kept under `kind`.

        Raises:
            ValueError: Where no target is among the candidates.
        """
        longest = max(map(len, targets))
        padded = torch.full((len(targets), longest), -2)
        for row, own in zip(padded, targets):
            row[: len(own)] = torch.as_tensor(own)
        chosen = (items[:, :, None] == padded[:, None, :]).any(2)  # (B, C)
        useful = chosen.any(1)
        if not useful.any():
            raise ValueError(f"no target of the {len(targets)} users is among their candidates: nothing to fit.")
        x, chosen, real = features[useful].double(), chosen[useful], items[useful] >= 0
        if self.item_values is not None:
            x[:, :, -1] = 0.0
        spread = x[real].std(0)
        scale = torch.where(spread > 0, spread, torch.ones_like(spread))
        x = x / scale  # one step size for all features
        weights = torch.zeros(x.shape[2], dtype=torch.double)
        weights[0] = 1.0
        weights.requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            log_probs = (x @ weights).masked_fill(~real, -torch.inf).log_softmax(1)
            loss = -(log_probs.masked_fill(~chosen, 0.0).sum(1) / chosen.sum(1)).mean()
            loss = loss + _RIDGE * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        own = (weights.detach() / scale).tolist()
        self.weights[kind] = dict(zip(self.features, own))
        return self.weights[kind]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `reranker.json`, and each scorer into `scorers/<name>`; item vectors are in the model."""
        scorers = {name: scorer for name, scorer in self.scorers.items() if name != ITEM_VECTORS}
        classes = {name: type(scorer).__name__ for name, scorer in scorers.items()}
        if strange := [name for name, own in classes.items() if own not in baselines.SCORERS]:
            raise ValueError(f"the scorers {strange} are no baselines of this package: they cannot be saved with it.")
        folder = Path(folder)
        for name, scorer in scorers.items():
            (folder / FOLDER / name).mkdir(parents=True, exist_ok=True)
            scorer.save_pretrained(folder / FOLDER / name)
        settings = {"scorers": classes, "weights": self.weights, "num_candidates": self.num_candidates}
        settings |= {"item_head": self.item_head, "search": self.search, "item_vectors": ITEM_VECTORS in self.scorers}
        if self.positions is not None:
            settings["positions"] = self.positions.tolist()
        (folder / VALUES_NAME).unlink(missing_ok=True)  # of an earlier re-ranker
        if self.item_values is not None:
            settings["item_values"] = True
            save_file({"item_values": self.item_values}, folder / VALUES_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, repo: str | os.PathLike, model: Any = None, **hub_kwargs) -> "Reranker":
        """Reads what `save_pretrained` wrote, from a folder or a Hub repository; `model` is the one of the repository,
        whose item vectors may be a scorer.

        Raises:
            ValueError: Where they are one, and `model` is not given or reads none.
        """
        settings = json.loads(Path(str(cached_file(str(repo), CONFIG_NAME, **hub_kwargs))).read_text(encoding="utf-8"))
        scorers: dict[str, Any] = {}
        if settings.get("item_vectors"):
            neighbours = None if model is None else item_neighbours(model)
            if neighbours is None:
                given = "no model" if model is None else f"a {type(model).__name__} that reads no item vectors"
                raise ValueError(
                    f"{CONFIG_NAME} of {repo} has the item vectors of its model as a scorer, and got {given}: pass "
                    "`model`, or load the repository with `Recommender.from_pretrained`."
                )
            scorers[ITEM_VECTORS] = neighbours
        for name, kind in settings["scorers"].items():
            paths = [cached_file(str(repo), f"{FOLDER}/{name}/{file}", **hub_kwargs) for file in FILES]
            scorers[name] = baselines.SCORERS[kind].from_pretrained(Path(str(paths[0])).parent)
        names = ("weights", "num_candidates", "item_head", "search")
        own: dict[str, Any] = {name: settings[name] for name in names if name in settings}
        if settings.get("item_values"):
            own["item_values"] = load_file(str(cached_file(str(repo), VALUES_NAME, **hub_kwargs)))["item_values"]
        reranker = cls(scorers, **own)
        if "positions" in settings:
            reranker.positions = torch.tensor(settings["positions"])
        return reranker


_FLOOR = -20.0  # nats: what "cannot be scored" counts as
_RIDGE = 1e-6  # a feature that never varies gets weight 0


def _once(items: torch.Tensor) -> torch.Tensor:
    """Candidates (B, C), each item of a row once, -1 at the end of a row; columns that are empty everywhere go."""
    ordered, order = items.sort(dim=1, stable=True)
    twice = torch.zeros_like(ordered, dtype=torch.bool)
    twice[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    items = items.masked_fill(torch.zeros_like(twice).scatter(1, order, twice), -1)
    order = (items < 0).int().argsort(dim=1, stable=True)  # the beam's items first, in their order
    items = items.gather(1, order)
    return items[:, : max(1, int((items >= 0).sum(1).max()))]


__all__ = ["CONFIG_NAME", "FILES", "FOLDER", "ITEM_VECTORS", "VALUE", "Reranker", "item_neighbours"]
