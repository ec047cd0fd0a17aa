"""How far a model has moved from the seed model: KL(seed || M), estimated without keeping the seed model.

Before the first step one candidate S is sampled from the seed model for each of some rows, and log seed(S|H) is
stored. The mean of log seed(S|H) - log M(S|H) is then an unbiased estimate of the divergence per item or session, in
nats; it may be negative by chance.
The direction is the one whose samples can be drawn once; KL(M || seed) would need the seed model at every estimate.

Legend: B users, m items of a candidate (1, or a session), L levels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from .pair_mining import candidate_log_probs, completion_log_probs, context_inputs


@torch.no_grad()
def sample_candidates(
    model: Any, context: dict[str, torch.Tensor], num_samples: int, generator: torch.Generator
) -> torch.Tensor:
    """
    Ancestral samples of the model's own distribution, codes that are no item included unless it normalises over items
    alone.

    Returns:
        `torch.LongTensor` of shape (B, num_samples, m, L): token ids.
    """
    context_kv, config = model.encode_context(**context), model.config
    cache, levels, node, codes = DynamicCache(config=config), config.num_levels, None, []
    tokens = context_kv.mask.new_full((len(context_kv.mask) * num_samples, 1), config.bos_token_id, dtype=torch.long)
    for step in range(model.num_session_items * levels):
        level = step % levels
        log_probs = model.level_log_probs(model.next_hidden(tokens, context_kv, cache), level, node if level else None)
        code = torch.multinomial(log_probs.exp(), 1, generator=generator)
        tokens = code + config.level_offsets[level]
        codes.append(tokens)
        if config.score_normalization == "valid":
            node = model.catalogue.step(node if level else None, level, code[:, 0])
        if level + 1 == levels:  # the next item of a session starts behind a BOS of its own
            tokens = F.pad(tokens, (0, 1), value=config.bos_token_id)
    return torch.cat(codes, dim=1).view(len(context_kv.mask), num_samples, -1, levels)


@torch.no_grad()
def draw_samples(
    model: Any, rows: Any, row_ids: list[int], collator: Any, generator: torch.Generator, batch_size: int
) -> list[dict]:
    """One sample of `model`, the seed, for each of the rows `row_ids`: `row`, `token_ids` (m * L) and `log_prob`."""
    samples = []
    for start in range(0, len(row_ids), batch_size):
        part = row_ids[start : start + batch_size]
        batch = context_inputs(collator([rows[i] for i in part]))
        context = {name: value.to(model.device) for name, value in batch.items()}
        token_ids = sample_candidates(model, context, 1, generator)
        log_probs = completion_log_probs(model, context, token_ids)[:, 0].tolist()
        for row, ids, log_prob in zip(part, token_ids.flatten(1).tolist(), log_probs):
            samples.append({"row": row, "token_ids": ids, "log_prob": log_prob})
    return samples


def seed_log_ratios(model: Any, rows: Any, samples: list[dict], collator: Any, batch_size: int) -> torch.Tensor:
    """log seed(S|H) - log M(S|H) of samples of [`draw_samples`]; their mean estimates KL(seed || M)."""
    shape = (len(samples), 1, model.num_session_items, model.config.num_levels)
    token_ids = torch.tensor([sample["token_ids"] for sample in samples], dtype=torch.long).view(shape)
    row_ids = [sample["row"] for sample in samples]
    log_probs = candidate_log_probs(model, rows, row_ids, token_ids, collator, batch_size)[:, 0]
    return torch.tensor([sample["log_prob"] for sample in samples]) - log_probs


__all__ = ["draw_samples", "sample_candidates", "seed_log_ratios"]
