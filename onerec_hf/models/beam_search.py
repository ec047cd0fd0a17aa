"""Exact constrained beam search, and sampling, over a catalogue: the context is read once per user, dead beams are
never filled.

The papers decode with beam search (OneRec, section 4: width 128; OneRec-V2, section 4: width 512), OneRec a whole
session of items, each behind a BOS of its own (section 3.2). Reinforcement learning draws groups of items instead:
with replacement, or without it by stochastic beam search (Kool et al., arXiv:1903.06059). Legend: B users, K beams or
samples, m items of a session, L levels, V codes of a level; a step's candidates are R runs of W children of one beam
each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .catalogue import Catalogue
from .input_checks import check_rows_allowed, widths_of
from .modeling_attention import ContextKV

_DEAD = float("-inf")


@dataclass
class BeamSearchOutput(ModelOutput):
    """
    Args:
        semantic_ids (`torch.LongTensor` of shape (B, K, m, L)): Codes of each item of each beam, best beam first; -1
            on dead beams.
        leaves (`torch.LongTensor` of shape (B, K, m)): Leaves of the catalogue, -1 on dead beams.
        scores (`torch.FloatTensor` of shape (B, K)): Summed natural log-probability of the codes, `-inf` on dead
            beams.
        sample_log_probs (`torch.FloatTensor` of shape (B, K)): Of samples, the natural log-probability with
            which each was drawn: as `scores`, but after the temperature and normalised at each step over the codes
            that could be drawn.
        gumbels (`torch.FloatTensor` of shape (B, K)): Of samples without replacement, `sample_log_probs` plus Gumbel
            noise; the samples are the K largest. With kappa = `gumbels[:, -1]` left out, exp(q) / (1 - exp(-exp(q -
            kappa))) of the others' `sample_log_probs` q are the weights of an unbiased sum over all items
            (arXiv:1903.06059, 4.2).
    """

    semantic_ids: torch.Tensor | None = None
    leaves: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    sample_log_probs: torch.Tensor | None = None
    gumbels: torch.Tensor | None = None


def _top(values: torch.Tensor, k: int):
    """Largest `k` of (B, R, W) per user, filled up with -inf: values (B, k), places in R * W (B, k), and which are
    -inf.
    """
    values = values.flatten(1)
    if values.shape[1] < k:
        values = F.pad(values, (0, k - values.shape[1]), value=_DEAD)
    values, best = values.topk(k, dim=1)
    dead = values == _DEAD
    return values, best.masked_fill(dead, 0), dead


class BeamSearch:
    """Keeps the K prefixes of the largest score."""

    distinct = True  # no two beams of a user are the same prefix
    padded = False  # whether the children of a beam must be one run
    chunk_bytes = 2**23  # log-probabilities of a step are made and used up for so many users at a time, on a CPU

    def choose(
        self, scores: torch.Tensor, log_probs: torch.Tensor, parent: torch.Tensor, real: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places (B, k) among the (B, R, W) candidates, and which of them are dead."""
        return _top(torch.where(real, log_probs + scores.gather(1, parent).unsqueeze(2), _DEAD), k)[1:]


class _Samples:
    """Draws each of the K continuations alone: with replacement."""

    distinct, padded, chunk_bytes = False, True, None
    gumbels: torch.Tensor | None = None

    def __init__(self, batch: int, temperature: float, generator: torch.Generator | None, device):
        self.temperature, self.generator = temperature, generator
        self.log_probs = torch.zeros(batch, 1, device=device)

    def _gumbel(self, shape, device):
        # torch's exponential_ never draws 0, so the logarithm is finite
        return -torch.empty(shape, device=device).exponential_(generator=self.generator).log()

    def _normalised(self, log_probs, parent, real):
        """(B, R, W) log-probability of each candidate, normalised over the real children of its parent."""
        logits = torch.where(real, log_probs / self.temperature, _DEAD)
        beams = self.log_probs.shape[1]
        top = logits.new_full((logits.shape[0], beams), _DEAD).scatter_reduce(1, parent, logits.amax(2), "amax")
        top = top.masked_fill(top == _DEAD, 0.0)  # beams without a child
        logits = logits - top.gather(1, parent).unsqueeze(2)
        total = torch.zeros_like(top).scatter_add(1, parent, logits.exp().sum(2))
        # a beam without a child keeps -inf; NaN is left to what the model computed
        return (logits - total.log().gather(1, parent).unsqueeze(2)).masked_fill(logits == _DEAD, _DEAD)

    def choose(self, scores, log_probs, parent, real, k):
        log_probs = self._normalised(log_probs, parent, real)
        drawn = log_probs.expand(-1, k, -1)  # the first step has one run, drawn from K times; later ones have K
        best = (drawn + self._gumbel(drawn.shape, drawn.device)).argmax(2)
        self.log_probs = self.log_probs.expand(-1, k) + drawn.gather(2, best.unsqueeze(2)).squeeze(2)
        dead = self.log_probs == _DEAD
        run = torch.arange(k, device=best.device) if log_probs.shape[1] == k else 0
        return best + run * log_probs.shape[2], dead


class _DistinctSamples(_Samples):
    """Draws K different continuations: stochastic beam search (arXiv:1903.06059, algorithm 1)."""

    distinct, padded = True, False

    def __init__(self, batch, temperature, generator, device):
        super().__init__(batch, temperature, generator, device)
        self.gumbels = self._gumbel((batch, 1), device)

    def choose(self, scores, log_probs, parent, real, k):
        log_probs = self._normalised(log_probs, parent, real) + self.log_probs.gather(1, parent).unsqueeze(2)
        drawn = torch.where(real, log_probs + self._gumbel(log_probs.shape, log_probs.device), _DEAD)
        # Gumbels of the children under the condition that their largest is the parent's (appendix B.3)
        largest = torch.full_like(self.gumbels, _DEAD).scatter_reduce(1, parent, drawn.amax(2), "amax")
        limit = self.gumbels.gather(1, parent).unsqueeze(2)
        below = limit - drawn + torch.log1p(-(drawn - largest.gather(1, parent).unsqueeze(2)).exp())
        drawn = limit - below.clamp(min=0) - torch.log1p((-below.abs()).exp())
        self.gumbels, best, dead = _top(torch.where(real & (limit != _DEAD), drawn, _DEAD), k)
        self.log_probs = log_probs.flatten(1).gather(1, best).masked_fill(dead, _DEAD)
        return best, dead


class SharedContext:
    """The beams of B users in a model of this package: one context per user, only generated rows are gathered."""

    def __init__(self, model: Any, catalogue: Catalogue, context_kv: ContextKV):
        self.model, self.catalogue, self.context_kv = model, catalogue, context_kv
        self.cache = DynamicCache(config=model.config)

    def advance(
        self, level: int, code: torch.Tensor | None = None, parent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, K, D) in front of the codes of `level`; `code` (B, K) was chosen last, in row `parent` (B * K,)."""
        config, batch = self.model.config, self.context_kv.mask.shape[0]
        if parent is None:
            tokens = torch.full((batch, 1), config.bos_token_id, device=self.context_kv.mask.device)
        else:
            self.cache.batch_select_indices(parent)
            tokens = (code + config.level_offsets[level - 1]).view(-1, 1)
            if level == 0:  # the next item of a session starts behind a BOS of its own
                tokens = F.pad(tokens, (0, 1), value=config.bos_token_id)
        return self.model.next_hidden(tokens, self.context_kv, self.cache).unflatten(0, (batch, -1))

    def log_probs(self, hidden: torch.Tensor, level: int, node: torch.Tensor | None = None) -> torch.Tensor:
        """(b * K, V) log-probabilities of the codes of `level` for some of the users, behind `node` (b, K)."""
        prefix = None if node is None else node.flatten().clamp(min=0)
        return self.model.level_log_probs(hidden.flatten(0, 1), level, prefix, self.catalogue)


def _used_up(catalogue: Catalogue, path: torch.Tensor, level: int, leaf_totals) -> torch.Tensor:
    """
    Nodes of `level` that a beam may not enter again, because each of their leaves is an item of its session already.

    Args:
        path (`torch.LongTensor` of shape (B, K, i, L)): Nodes on the way to the i items that each beam has.
        leaf_totals (`torch.Tensor` of shape (B, leaves + 1), *optional*): Running count of the leaves that each user
            may get.

    Returns:
        `torch.LongTensor` of shape (B, K, i): node or -1. Only the ancestors of a session's items can be used up.
    """
    node = path[..., level]
    first, end = catalogue.leaf_range(node.clamp(min=0), level)
    if leaf_totals is not None:
        first, end = (leaf_totals.gather(1, edge.flatten(1)).view(edge.shape) for edge in (first, end))
    taken = (node.unsqueeze(3) == node.unsqueeze(2)).sum(3)  # the items of a session are different leaves
    return torch.where(taken >= end - first, node, -1)


class _Step:
    """One step of the search: the next K prefixes of some users out of all children of their beams."""

    def __init__(self, decoder, chooser, catalogue, node_masks, leaf_totals, widths):
        self.decoder, self.chooser, self.catalogue, self.widths = decoder, chooser, catalogue, widths
        self.node_masks, self.leaf_totals = node_masks, leaf_totals

    def __call__(self, hidden, scores, path, users: slice):
        """hidden (b, k, D), scores (b, k), path (b, k, steps) -> scores, parents, children (b, K) and which are
        dead.
        """
        catalogue, (batch, beams, steps) = self.catalogue, path.shape
        item, level = divmod(steps, catalogue.num_levels)
        node = path[:, :, -1] if level else None
        log_probs = self.decoder.log_probs(hidden, level, node)  # (b * k, V)
        # sessions may meet in a node, different single items cannot
        distinct = self.chooser.distinct and item == 0
        parent, child, real = catalogue.expand(node, level, beams, distinct, self.chooser.padded)
        parent, child, real = parent.expand(batch, -1), child.expand(batch, -1, -1), real.expand(batch, -1, -1)
        codes = (
            catalogue.codes[level].index_select(0, child.flatten()).view(child.shape)
        )  # half the time of codes[child]
        place = (parent * log_probs.shape[1]).unsqueeze(2) + codes
        log_probs = log_probs.reshape(batch, -1).gather(1, place.flatten(1)).view(child.shape)  # (b, R, W)
        if self.node_masks is not None:
            real = real & self.node_masks[level][users].gather(1, child.flatten(1)).view(child.shape)
        if item:
            done = path[:, :, : item * catalogue.num_levels].unflatten(2, (item, -1))
            leaf_totals = None if self.leaf_totals is None else self.leaf_totals[users]
            for used in _used_up(catalogue, done, level, leaf_totals).unbind(2):
                real = real & (used.gather(1, parent).unsqueeze(2) != child)
        best, dead = self.chooser.choose(scores, log_probs, parent, real, self.widths[level])  # (b, K)
        parent, child = parent.gather(1, best // child.shape[2]), child.flatten(1).gather(1, best)
        scores = (scores.gather(1, parent) + log_probs.flatten(1).gather(1, best)).masked_fill(dead, _DEAD)
        return scores, parent, child, dead


def search(
    decoder: Any,
    chooser: Any,
    catalogue: Catalogue,
    batch: int,
    k: int | Sequence[int],
    allowed_items: torch.Tensor | list[torch.Tensor] | None = None,
    num_session_items: int = 1,
) -> BeamSearchOutput:
    """
    The loop that beam search and sampling share: static shapes, nothing read back from the device.

    Args:
        decoder: As [`SharedContext`].
        chooser: As [`BeamSearch`].
        k: Beams or samples; of [`BeamSearch`] one number for each level at will.
        allowed_items (`torch.BoolTensor` or `list`, *optional*): As in [`beam_search`].

    Returns:
        [`BeamSearchOutput`] without the fields of samples.
    """
    device, levels = catalogue.device, catalogue.num_levels
    widths = widths_of(k, levels)
    if num_session_items < 1:
        raise ValueError(f"num_session_items={num_session_items}: a session has at least 1 item.")
    node_masks = catalogue.node_masks(allowed_items) if isinstance(allowed_items, torch.Tensor) else allowed_items
    if node_masks is not None:
        check_rows_allowed(node_masks, batch, [len(codes) for codes in catalogue.codes])
    node_masks = None if node_masks is None else [mask.expand(batch, -1) for mask in node_masks]
    leaf_totals = None if node_masks is None or num_session_items == 1 else F.pad(node_masks[-1].cumsum(1), (1, 0))
    step = _Step(decoder, chooser, catalogue, node_masks, leaf_totals, widths)
    rows = torch.arange(batch, device=device).unsqueeze(1)
    scores = torch.zeros(batch, 1, device=device)
    path = torch.zeros(batch, 1, 0, dtype=torch.long, device=device)  # (B, K, steps) nodes chosen so far
    last: dict[str, torch.Tensor] = {}
    for position in range(num_session_items * levels):
        level, beams = position % levels, scores.shape[1]
        hidden = decoder.advance(level, **last)
        chunk = batch
        if device.type == "cpu" and chooser.chunk_bytes is not None:
            chunk = max(1, chooser.chunk_bytes // (4 * beams * catalogue.codebook_sizes[level]))
        users = [slice(start, start + chunk) for start in range(0, batch, chunk)]
        chosen = [step(hidden[some], scores[some], path[some], some) for some in users]
        scores, parent, child, dead = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*chosen))
        path = torch.cat([path[rows, parent], child.unsqueeze(2)], dim=2).masked_fill(dead.unsqueeze(2), -1)
        last = {"code": catalogue.codes[level][child].long(), "parent": (parent + rows * beams).flatten()}
    path = path.unflatten(2, (num_session_items, levels))
    codes = torch.stack([catalogue.codes[level][path[..., level]].long() for level in range(levels)], dim=3)
    codes = codes.masked_fill(dead[:, :, None, None], -1)
    return BeamSearchOutput(semantic_ids=codes, leaves=path[..., -1], scores=scores)


def beam_search(
    model: Any,
    catalogue: Catalogue,
    context_kv: ContextKV,
    num_beams: int | Sequence[int],
    allowed_items: torch.Tensor | list[torch.Tensor] | None = None,
    num_session_items: int = 1,
) -> BeamSearchOutput:
    """
    The `num_beams` best items of the catalogue for each user, or the best sessions of `num_session_items` different
    items.

    Exact in the usual sense of beam search: at each step the K best existing prefixes survive. With `num_beams` at
    least the number of prefixes of every step but the last, it equals scoring every item (every ordered session) of
    the catalogue. An item of a session is preceded by a BOS of its own, which costs nothing; no leaf occurs twice in a
    session. Which of two prefixes with equal scores comes first is left open.

    Args:
        model: A model of this package: `model.next_hidden`, `model.level_log_probs` and `model.config` are used.
        catalogue (`Catalogue`): On the model's device.
        context_kv (`ContextKV`): The encoded context of the B users.
        num_beams (`int` or `Sequence[int]`): K; or the width of each level, the last of which is K. Early levels that
            are too narrow lead to fewer than K items.
        allowed_items (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Subset of the items, per request; or
            what `catalogue.node_masks` made of it.
        num_session_items (`int`, defaults to 1): m, items per session.

    Returns:
        [`BeamSearchOutput`]; where fewer than K items or sessions exist, the rest of the beams are dead (`-inf`, -1).
    """
    decoder = SharedContext(model, catalogue, context_kv)
    return search(
        decoder, BeamSearch(), catalogue, context_kv.mask.shape[0], num_beams, allowed_items, num_session_items
    )


def sample_items(
    model: Any,
    catalogue: Catalogue,
    context_kv: ContextKV,
    num_samples: int,
    replacement: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    allowed_items: torch.Tensor | list[torch.Tensor] | None = None,
    num_session_items: int = 1,
) -> BeamSearchOutput:
    """
    Draw a group of `num_samples` items (or sessions) of the catalogue for each user.

    At each step a code has the probability softmax(log-probability / temperature) over the codes that lead on to an
    existing, allowed item. Without replacement, the K different samples are those of drawing one after the other and
    never again what was drawn, largest `gumbels` first; they cost as much as a beam search.

    Args:
        replacement (`bool`, defaults to `False`): Whether an item may be drawn more than once.
        temperature (`float`, defaults to 1.0): Above 0.
        generator (`torch.Generator`, *optional*): On the model's device. Defaults to torch's global one.
        model, catalogue, context_kv, allowed_items, num_session_items: As in [`beam_search`].

    Returns:
        [`BeamSearchOutput`] with `sample_log_probs`, and with `gumbels` when there is no replacement. Samples are dead
        (`-inf`, -1) where no item is left.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; for the best items use beam_search.")
    batch, device = context_kv.mask.shape[0], context_kv.mask.device
    chooser = (_Samples if replacement else _DistinctSamples)(batch, temperature, generator, device)
    found = search(
        SharedContext(model, catalogue, context_kv),
        chooser,
        catalogue,
        batch,
        num_samples,
        allowed_items,
        num_session_items,
    )
    found.sample_log_probs, found.gumbels = chooser.log_probs, chooser.gumbels
    return found


__all__ = ["BeamSearch", "BeamSearchOutput", "SharedContext", "beam_search", "sample_items", "search"]
