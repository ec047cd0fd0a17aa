"""Exact constrained beam search over a catalogue: the context is read once per user, dead beams are never filled.

The papers decode with beam search (OneRec, section 4.1: width 128; OneRec-V2, section 5: width 512). Legend: B users, K beams,
L levels, W largest fan-out of a level.
"""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .catalogue import Catalogue
from .layers import ContextKV


@dataclass
class BeamSearchOutput(ModelOutput):
    """
    Args:
        semantic_ids (`torch.LongTensor` of shape (B, K, L)): Codes, best first; -1 on dead beams.
        leaves (`torch.LongTensor` of shape (B, K)): Leaves of the catalogue, -1 on dead beams.
        scores (`torch.FloatTensor` of shape (B, K)): Summed natural log-probability of the codes, `-inf` on dead beams.
    """

    semantic_ids: torch.LongTensor | None = None
    leaves: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None


def _top(scores: torch.Tensor, k: int):
    """`topk` that fills up with -inf where there are fewer than `k` candidates."""
    if scores.shape[1] < k:
        scores = torch.nn.functional.pad(scores, (0, k - scores.shape[1]), value=float("-inf"))
    return scores.topk(k, dim=1)


def beam_search(model, catalogue: Catalogue, context_kv: ContextKV, num_beams: int, allowed=None) -> BeamSearchOutput:
    """
    The `num_beams` best items of the catalogue for each user, pruned level by level.

    Exact in the usual sense of beam search: at each level the K best existing prefixes survive. With `num_beams` at least the
    number of prefixes of every level but the last, it equals scoring the whole catalogue.

    Args:
        model: A model of this package: `model.next_hidden`, `model.level_log_probs` and `model.config` are used.
        catalogue (`Catalogue`): On the model's device.
        context_kv (`ContextKV`): The encoded context of the B users.
        num_beams (`int`): K.
        allowed (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Subset of the items, per request.

    Returns:
        [`BeamSearchOutput`]; where fewer than K items exist, the rest of the beams are dead (`-inf`, -1).
    """
    batch, device = context_kv.mask.shape[0], context_kv.mask.device
    alive = None if allowed is None else [mask.expand(batch, -1) for mask in catalogue.alive(allowed)]
    cache = DynamicCache(config=model.config)
    tokens = torch.full((batch, 1), model.config.bos_token_id, device=device)
    node, scores, codes = (
        None,
        torch.zeros(batch, 1, device=device),
        torch.zeros(batch, 1, 0, dtype=torch.long, device=device),
    )
    for level in range(catalogue.num_levels):
        beams = scores.shape[1]
        hidden = model.next_hidden(tokens, context_kv, cache)  # (B * beams, D)
        prefix = None if node is None else node.flatten().clamp(min=0)
        log_probs = model.level_log_probs(hidden, level, prefix, catalogue)  # (B * beams, V)
        parent, code, child, real = (x.expand(batch, -1) for x in catalogue.expand(node, level))  # (B, M)
        vocab = log_probs.shape[1]
        candidate = log_probs.view(batch, -1).gather(1, parent * vocab + code) + scores.gather(1, parent)
        if alive is not None:
            real = real & alive[level].gather(1, child)
        scores, best = _top(candidate.masked_fill(~real, float("-inf")), num_beams)
        dead = scores == float("-inf")
        best = best.masked_fill(dead, 0)
        parent, code = parent.gather(1, best), code.gather(1, best)  # (B, K)
        node = child.gather(1, best).masked_fill(dead, -1)
        codes = torch.cat([codes.gather(1, parent.unsqueeze(-1).expand(-1, -1, level)), code.unsqueeze(-1)], dim=2)
        if level + 1 < catalogue.num_levels:
            rows = parent + torch.arange(batch, device=device).unsqueeze(1) * beams
            cache.batch_select_indices(rows.flatten())
            tokens = (code + model.config.level_offsets[level]).view(-1, 1)
    return BeamSearchOutput(semantic_ids=codes.masked_fill(dead.unsqueeze(-1), -1), leaves=node, scores=scores)


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
        allowed = torch.nn.functional.pad(allowed, (0, 1)).scatter_(1, spare, True)[:, :-1]
        return scores.masked_fill(~allowed, float("-inf"))


__all__ = ["BeamSearchOutput", "CatalogueLogitsProcessor", "beam_search"]
