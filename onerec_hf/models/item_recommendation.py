"""From a context to items: the search with nothing around it, no tokens in between.

The papers recommend by beam search: OneRec, section 4.1, whole sessions; OneRec-V2, section 5, single items. Legend: B users, N
items of the catalogue, K beams, m items of a session.
"""

from typing import Any, NamedTuple

import torch

from .beam_search import beam_search
from .catalogue import Catalogue
from .generation_semantic_id import CatalogueGenerationMixin
from .input_checks import check_finite, check_generate


class RecommendedItems(NamedTuple):
    """
    Args:
        items (`torch.LongTensor` of shape (B, k), sessions (B, k, m)): Item indices of the catalogue, best first, -1 for none.
        scores (`torch.FloatTensor` of shape (B, k)): Natural log-probability of the semantic IDs of an item, or of all items of a
            session; `-inf` for none.
    """

    items: torch.Tensor
    scores: torch.Tensor


class ItemRecommendationMixin(CatalogueGenerationMixin):
    """`recommend_items`, beside `generate`."""

    @torch.no_grad()
    def recommend_items(
        self,
        k: int = 10,
        *,
        num_beams: int | None = None,
        allowed_items: torch.Tensor | None = None,
        num_session_items: int | None = None,
        catalogue: Catalogue | None = None,
        **context: Any,
    ) -> RecommendedItems:
        r"""
        The `k` best items of each user, or the `k` best sessions.

        The items of one semantic ID follow each other, popular ones first, and share its score. In a session, the most popular
        allowed item of a semantic ID stands for all of them.

        Args:
            k (`int`, defaults to 10): Items, or sessions, per user.
            num_beams (`int`, *optional*, defaults to the larger of `k` and 50): K, the width of the search.
            allowed_items (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Items each user may get.
            num_session_items (`int`, *optional*): m; returns sessions of m different items, in order. Left out, single items.
            catalogue (`Catalogue`, *optional*): Instead of the model's own.
            context: `context_ids` (B, T, L), `context_mask`, `context_features`, `user_features`, or `context_kv`.

        Returns:
            [`RecommendedItems`].

        Raises:
            ValueError: For a model in training mode; the mode is not changed here, since other threads may share the model. With
                `k` above `num_beams`, without a catalogue, for a context or a mask of the wrong shape.
        """
        if self.training:
            raise ValueError("the model is in training mode, with dropout: call `model.eval()` before you search.")
        width, length = max(k, 50) if num_beams is None else num_beams, num_session_items or 1
        if k < 1 or k > width:
            raise ValueError(f"k={k} with num_beams={width}: at least 1, and at most num_beams.")
        if unknown := sorted(set(context) - {*self.context_input_names, "context_kv"}):
            raise TypeError(
                f"recommend_items does not know {unknown}; a context has {list(self.context_input_names)}."
            )
        batch = check_generate(self.config, None, None, context, length)
        catalogue = self._require_catalogue(catalogue)
        allowed = None if allowed_items is None else allowed_items.to(catalogue.device)
        context_kv = context.pop("context_kv", None)
        if context_kv is None:
            context_kv = self.encode_context(**context)
        found = beam_search(self, catalogue, context_kv, width, allowed, length)
        check_finite(found.scores, f"{type(self).__name__}.recommend_items")
        if num_session_items is not None:
            items = catalogue.item_of_each(found.leaves[:, :k].flatten(1), allowed).view(batch, k, length)
            return RecommendedItems(items, found.scores[:, :k])
        items, beam = catalogue._ranked_items(found.leaves[:, :, 0], k, allowed)
        scores = found.scores.gather(1, beam.clamp(min=0)).masked_fill(items < 0, float("-inf"))
        return RecommendedItems(items, scores)


__all__ = ["ItemRecommendationMixin", "RecommendedItems"]
