"""Exact constrained beam search over a catalogue: the context is read once per user, dead beams are never filled.

The papers decode with beam search (OneRec, section 4.1: width 128; OneRec-V2, section 5: width 512), OneRec a whole session of
items, each behind a BOS of its own (section 3.2). Legend: B users, K beams, m items of a session, L levels, V codes of a level,
M candidates of a step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .catalogue import Catalogue
from .layers import ContextKV


@dataclass
class BeamSearchOutput(ModelOutput):
    """
    Args:
        semantic_ids (`torch.LongTensor` of shape (B, K, m, L)): Codes of each item of each beam, best beam first; -1 on dead beams.
        leaves (`torch.LongTensor` of shape (B, K, m)): Leaves of the catalogue, -1 on dead beams.
        scores (`torch.FloatTensor` of shape (B, K)): Summed natural log-probability of the codes, `-inf` on dead beams.
    """

    semantic_ids: torch.LongTensor | None = None
    leaves: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None


def _top(scores: torch.Tensor, k: int):
    """`topk` that fills up with -inf where there are fewer than `k` candidates."""
    if scores.shape[1] < k:
        scores = F.pad(scores, (0, k - scores.shape[1]), value=float("-inf"))
    return scores.topk(k, dim=1)


def _used_up(catalogue: Catalogue, path: torch.LongTensor, level: int, leaf_totals) -> torch.LongTensor:
    """
    Nodes of `level` that a beam may not enter again, because each of their leaves is an item of its session already.

    Args:
        path (`torch.LongTensor` of shape (B, K, i, L)): Nodes on the way to the i items that each beam has.
        leaf_totals (`torch.Tensor` of shape (B, leaves + 1), *optional*): Running count of the leaves that each user may get.

    Returns:
        `torch.LongTensor` of shape (B, K, i): node or -1. Only the ancestors of a session's items can be used up.
    """
    node = path[..., level]
    first, end = catalogue.leaf_range(node.clamp(min=0), level)
    if leaf_totals is not None:
        first, end = (leaf_totals.gather(1, edge.flatten(1)).view(edge.shape) for edge in (first, end))
    taken = (node.unsqueeze(3) == node.unsqueeze(2)).sum(3)  # the items of a session are different leaves
    return torch.where(taken >= end - first, node, -1)


def beam_search(
    model, catalogue: Catalogue, context_kv: ContextKV, num_beams: int, allowed=None, num_items: int = 1
) -> BeamSearchOutput:
    """
    The `num_beams` best items of the catalogue for each user, or the best sessions of `num_items` different items.

    Exact in the usual sense of beam search: at each step the K best existing prefixes survive. With `num_beams` at least the
    number of prefixes of every step but the last, it equals scoring every item (every ordered session) of the catalogue. An item
    of a session is preceded by a BOS of its own, which costs nothing; no leaf occurs twice in a session.

    Args:
        model: A model of this package: `model.next_hidden`, `model.level_log_probs` and `model.config` are used.
        catalogue (`Catalogue`): On the model's device.
        context_kv (`ContextKV`): The encoded context of the B users.
        num_beams (`int`): K.
        allowed (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Subset of the items, per request.
        num_items (`int`, defaults to 1): m, items per session.

    Returns:
        [`BeamSearchOutput`]; where fewer than K items or sessions exist, the rest of the beams are dead (`-inf`, -1).
    """
    batch, device, levels = context_kv.mask.shape[0], context_kv.mask.device, catalogue.num_levels
    alive = catalogue.alive(allowed) if isinstance(allowed, torch.Tensor) else allowed
    alive = None if alive is None else [mask.expand(batch, -1) for mask in alive]
    leaf_totals = None
    if alive is not None and num_items > 1:
        leaf_totals = F.pad(alive[-1].cumsum(1), (1, 0))
    cache = DynamicCache(config=model.config)
    tokens = torch.full((batch, 1), model.config.bos_token_id, device=device)
    scores = torch.zeros(batch, 1, device=device)
    path = torch.zeros(batch, 1, 0, dtype=torch.long, device=device)  # (B, K, steps) nodes chosen so far
    rows = torch.arange(batch, device=device).unsqueeze(1)
    for step in range(num_items * levels):
        item, level = divmod(step, levels)
        beams = scores.shape[1]
        node = path[:, :, -1] if level else None
        hidden = model.next_hidden(tokens, context_kv, cache)  # (B * beams, D)
        prefix = node.flatten().clamp(min=0) if level else None
        log_probs = model.level_log_probs(hidden, level, prefix, catalogue)  # (B * beams, V)
        # sessions may meet in a node, single items cannot
        parent, child, real = catalogue.expand(node, level, beams, distinct=item == 0)  # (B, R), (B, R, W), (B, R, W)
        width = child.shape[2]
        parent, child, real = parent.expand(batch, -1), child.expand(batch, -1, -1), real.expand(batch, -1, -1)
        place = (parent * log_probs.shape[1]).unsqueeze(2) + catalogue.codes[level][child]
        candidate = log_probs.view(batch, -1).gather(1, place.flatten(1)).view(child.shape)
        candidate = candidate + scores.gather(1, parent).unsqueeze(2)
        if alive is not None:
            real = real & alive[level].gather(1, child.flatten(1)).view(child.shape)
        if item:
            done = path[:, :, : item * levels].unflatten(2, (item, levels))
            for used in _used_up(catalogue, done, level, leaf_totals).unbind(2):
                real = real & (used.gather(1, parent).unsqueeze(2) != child)
        scores, best = _top(torch.where(real, candidate, float("-inf")).flatten(1), num_beams)
        dead = scores == float("-inf")
        best = best.masked_fill(dead, 0)
        parent, child = parent.gather(1, best // width), child.flatten(1).gather(1, best)  # (B, K)
        path = torch.cat([path[rows, parent], child.unsqueeze(2)], dim=2).masked_fill(dead.unsqueeze(2), -1)
        if step + 1 < num_items * levels:
            cache.batch_select_indices((parent + rows * beams).flatten())
            tokens = (catalogue.codes[level][child].long() + model.config.level_offsets[level]).view(-1, 1)
            if level + 1 == levels:  # the next item starts behind a BOS of its own
                tokens = F.pad(tokens, (0, 1), value=model.config.bos_token_id)
    path = path.unflatten(2, (num_items, levels))
    codes = torch.stack([catalogue.codes[level][path[..., level]].long() for level in range(levels)], dim=3)
    return BeamSearchOutput(
        semantic_ids=codes.masked_fill(dead[:, :, None, None], -1), leaves=path[..., -1], scores=scores
    )


class CatalogueLogitsProcessor(LogitsProcessor):
    """
    The same constraint for transformers' own decoding loops (sampling, or any other model over the same vocabulary).

    Stateless and free of host syncs: the prefix of each row is walked down from its own tokens.

    Args:
        catalogue (`Catalogue`): The items that may be generated.
        level_offsets (`list[int]`): Token id of code 0 of each level.
        prompt_length (`int`): Tokens in front of the first code, BOS included.
        allowed (`torch.BoolTensor` of shape (B, N), *optional*): Subset per request; rows of one request are adjacent.
        eos_token_id (`int`, *optional*): Allowed alone once the semantic ID is complete.
    """

    def __init__(self, catalogue: Catalogue, level_offsets, prompt_length: int = 1, allowed=None, eos_token_id=None):
        self.catalogue, self.level_offsets, self.prompt_length = catalogue, list(level_offsets), prompt_length
        self.alive = None if allowed is None else catalogue.alive(allowed)
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids, scores):
        level = input_ids.shape[1] - self.prompt_length
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        if level >= self.catalogue.num_levels:
            if self.eos_token_id is None:
                raise ValueError(
                    f"nothing may follow {self.catalogue.num_levels} codes: set max_new_tokens to that number."
                )
            allowed[:, self.eos_token_id] = True
            return scores.masked_fill(~allowed, float("-inf"))
        node = None
        for depth in range(level):
            code = input_ids[:, self.prompt_length + depth] - self.level_offsets[depth]
            node = self.catalogue.step(node, depth, code)
        code, child, real = self.catalogue.children(None if node is None else node.clamp(min=0), level)
        code, child, real = (x.expand(len(scores), -1) for x in (code, child, real))
        if node is not None:
            real = real & (node >= 0).unsqueeze(1)
        if self.alive is not None:
            mask = self.alive[level]
            real = real & mask.repeat_interleave(len(scores) // len(mask), 0).gather(1, child)
        spare = torch.where(
            real, code + self.level_offsets[level], scores.shape[1]
        )  # padding goes to one extra column
        allowed = F.pad(allowed, (0, 1)).scatter_(1, spare, True)[:, :-1]
        return scores.masked_fill(~allowed, float("-inf"))


__all__ = ["BeamSearchOutput", "CatalogueLogitsProcessor", "beam_search"]
