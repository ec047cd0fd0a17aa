"""Preference pairs from a model's own beams (OneRec, Algorithm 2, arXiv:2502.18965): candidates, best and worst,
probabilities.

Legend: B users, N candidates of a user, n rejected ones, m items of a candidate (1, or a session), L levels.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from transformers import set_seed

from ..rewards.functions import RewardFunction, completion_leaves
from ..rewards.spelled import completion_columns


def context_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a collator's batch says about the user: all but the targets."""
    of_targets = ("target_ids", "target_positions", "causal_targets")
    return {name: value for name, value in batch.items() if name not in of_targets}


def generate_candidates(
    model: Any, context: dict[str, torch.Tensor], num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `num_candidates` most probable items or sessions of each user, by constrained beam search, most probable first.

    Args:
        model: A OneRec model with a catalogue, or a PEFT model around one.
        context (`dict[str, torch.Tensor]`): The context of B users.

    Returns:
        `token_ids`, `torch.LongTensor` of shape (B, N, m, L), and `alive`, `torch.BoolTensor` of shape (B, N): False
        where the catalogue holds fewer items, or the session fewer combinations; pad tokens stand there.
    """
    found = model.recommend_items(
        num_candidates, num_beams=num_candidates, num_session_items=model.num_session_items, **context
    ).items  # (B, N, m)
    codes = model.catalogue.semantic_ids[found.clamp(min=0)].long()
    token_ids = codes + torch.tensor(model.config.level_offsets, device=codes.device)
    alive = found[:, :, 0] >= 0
    return token_ids.masked_fill(~alive[:, :, None, None], model.config.pad_token_id), alive


def completion_log_probs(model: Any, context: dict[str, torch.Tensor], token_ids: torch.Tensor) -> torch.Tensor:
    """
    log M(S|H) of candidates: the sum over code tokens, normalised within the level, BOS excluded (OneRec eq. 10).

    Args:
        token_ids (`torch.LongTensor` of shape (B, N, m, L)): The candidates of a user are adjacent rows: one context
            serves them.

    Returns:
        `torch.FloatTensor` of shape (B, N), in nats, with gradient where enabled.
    """
    log_probs = model(target_ids=token_ids.flatten(0, 1), **context).target_log_probs  # (B * N, m, L)
    return log_probs.sum((1, 2)).view(token_ids.shape[:2])


def choose_pairs(
    rewards: torch.Tensor, num_rejected: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The best candidate and the `num_rejected` worst ones ("self-hard" negatives).

    Of equally good ones the more probable is taken on both sides; every rejected one is worse than the chosen one by
    more than the rounding of float32.

    Args:
        rewards (`torch.Tensor` of shape (B, N)): Most probable candidate first; NaN for one that takes no part.

    Returns:
        `chosen` (B,), `rejected` (B, n), both positions among the candidates; and the users without a pair as two
        masks (B,): `tied`, too few of whose rewards are different, and `few`, with fewer than n + 1 candidates.
    """
    usable = ~rewards.isnan()
    few = usable.sum(1) <= num_rejected
    best, chosen = rewards.masked_fill(~usable, -torch.inf).sort(dim=1, descending=True, stable=True)
    worst, rejected = rewards.masked_fill(~usable, torch.inf).sort(dim=1, stable=True)
    best, worst = best[:, 0], worst[:, min(num_rejected, rewards.shape[1]) - 1]
    # sessions of the same items in another order have the same reward up to the rounding of float32
    tied = ~few & (best - worst <= 1e-6 * torch.maximum(best.abs(), worst.abs()))
    return chosen[:, 0], rejected[:, :num_rejected], tied, few


@torch.no_grad()
def mine_pairs(
    model: Any,
    rows: list[dict],
    row_ids: list[int],
    collator: Callable,
    reward: RewardFunction,
    num_candidates: int,
    num_rejected: int = 1,
    batch_size: int = 32,
) -> tuple[list[dict], dict[str, float]]:
    """
    Mines one pair for each row whose candidates differ in reward.

    Args:
        model: In evaluation mode; it generates the candidates, and its log-probabilities become the reference's.
        rows (`list[dict]`): Rows of the data set, as the collator takes them; `row_ids` says which ones.
        reward (`RewardFunction`): With TRL's signature, as of `onerec_hf.rewards`: called with `prompts` (the numbers
            of the rows), `completions` (text), `completion_ids` (N adjacent ones per row: the codes, BOS between the
            items of a session, pad tokens where fewer candidates exist), `item_ids` ([`spelled_items`]) and every
            column of the rows, N times each; returns a finite number each, or `None` for a candidate that shall take
            no part.

    Returns:
        The pairs, `row`, `chosen` (m * L token ids), `rejected` (n * m * L), `ref_chosen_logps`, `ref_rejected_logps`
        (n), `chosen_reward`, `rejected_reward` (n); and sums over rows: `users`, `tied`, `few`, `hits` (a candidate
        holds a true next item), `reward` (mean over a user's candidates that have one) and `rewarded` (users with such
        a candidate).

    Raises:
        ValueError: A reward that is NaN or infinite, or another number of rewards than candidates.
    """
    pairs, sums = [], dict.fromkeys(("users", "tied", "few", "hits", "reward", "rewarded"), 0.0)
    for start in range(0, len(rows), batch_size):
        part, ids = rows[start : start + batch_size], row_ids[start : start + batch_size]
        batch = {name: value.to(model.device) for name, value in collator(part).items()}
        context = context_inputs(batch)
        token_ids, alive = generate_candidates(model, context, num_candidates)
        rewards = _rewards(reward, part, ids, token_ids, alive, model)
        chosen, rejected, tied, few = choose_pairs(rewards, num_rejected)
        sums["users"] += len(part)
        sums["tied"] += tied.sum().item()
        sums["few"] += few.sum().item()
        sums["hits"] += _hits(token_ids, batch, model.config.pad_token_id).sum().item()
        sums["reward"] += rewards.nanmean(1).nansum().item()
        sums["rewarded"] += (~rewards.isnan()).any(1).sum().item()
        keep = (~tied & ~few).nonzero()[:, 0]
        if not len(keep):
            continue
        place = torch.cat([chosen.unsqueeze(1), rejected], dim=1)[keep]  # (P, 1 + n)
        context = {name: value[keep.to(value.device)] for name, value in context.items()}
        picked = token_ids[keep.unsqueeze(1), place]  # (P, 1 + n, m, L)
        log_probs = completion_log_probs(model, context, picked)
        values = rewards[keep].gather(1, place)
        for i, user in enumerate(keep.tolist()):
            pairs.append(_pair(ids[user], picked[i], log_probs[i], values[i]))
    return pairs, sums


def mining_logs(pairs: list[dict], sums: list[dict[str, float]]) -> dict[str, float]:
    """What [`IPATrainer`] logs of an iteration: of the pairs of all processes, and of the sums of each
    ([`mine_pairs`]).
    """
    total = {name: sum(part[name] for part in sums) for name in sums[0]}
    names = {"tied": "tied", "few": "few", "hits": "hit_rate"}
    logs = {f"ipa/{new}": total[name] / total["users"] for name, new in names.items()} | {"ipa/pairs": len(pairs)}
    if total["rewarded"]:
        logs["ipa/reward_candidates"] = total["reward"] / total["rewarded"]
    if pairs:
        logs["ipa/reward_chosen"] = sum(pair["chosen_reward"] for pair in pairs) / len(pairs)
        rejected = [sum(pair["rejected_reward"]) / len(pair["rejected_reward"]) for pair in pairs]
        logs["ipa/reward_rejected"] = sum(rejected) / len(pairs)
    return logs


def _pair(row: int, token_ids, log_probs, rewards) -> dict:
    log_probs, rewards = log_probs.tolist(), rewards.tolist()
    return {
        "row": row,
        "chosen": token_ids[0].flatten().tolist(),
        "rejected": token_ids[1:].flatten().tolist(),
        "ref_chosen_logps": log_probs[0],
        "ref_rejected_logps": log_probs[1:],
        "chosen_reward": rewards[0],
        "rejected_reward": rewards[1:],
    }


def _rewards(reward, rows, row_ids, token_ids, alive, model) -> torch.Tensor:
    """Rewards (B, N) in float64 on the CPU, NaN for candidates that take no part."""
    num_candidates = token_ids.shape[1]
    with_bos = torch.nn.functional.pad(token_ids, (1, 0), value=model.config.bos_token_id).flatten(2)[:, :, 1:]
    completions = with_bos.flatten(0, 1).tolist()
    columns = {name: [row[name] for row in rows for _ in range(num_candidates)] for name in rows[0]}
    columns |= completion_columns(completions, model.catalogue, columns)
    prompts = [row for row in row_ids for _ in range(num_candidates)]
    found = reward(prompts=prompts, completion_ids=completions, **columns)
    if len(found) != alive.numel():
        raise ValueError(f"the reward function returned {len(found)} values for {alive.numel()} candidates.")
    silent = torch.tensor([value is None for value in found]).view(alive.shape) | ~alive.cpu()
    values = torch.tensor([0.0 if value is None else float(value) for value in found], dtype=torch.float64)
    values = values.view(alive.shape).masked_fill(silent, torch.nan)
    bad = ~values.isfinite() & ~silent
    if bool(bad.any()):
        user, candidate = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the reward function returned {values[user, candidate].item()} for candidate {candidate} of row "
            f"{row_ids[user]}: rewards must be finite, or None for a candidate that shall take no part."
        )
    return values


def _hits(token_ids, batch, pad_token_id) -> torch.Tensor:
    """Whether a candidate of each user holds a true next item, (B,)."""
    targets = batch["target_ids"]  # (B, n, L)
    real = targets[..., 0] != pad_token_id
    if "target_positions" in batch:  # targets inside the history are not next
        positions = batch["target_positions"].masked_fill(~real, -1)
        real = real & (positions == positions.amax(1, keepdim=True))
    equal = (token_ids.flatten(1, 2).unsqueeze(2) == targets.unsqueeze(1)).all(-1)  # (B, N * m, n)
    return (equal & real.unsqueeze(1)).flatten(1).any(1)


def check_pairs(pairs: datasets.Dataset, num_rows: int, model: Any, num_rejected: int) -> None:
    """
    Raises a ValueError unless pairs that somebody brought fit the data set and the model: columns, one pair per row,
    `num_rejected` whole candidates each, of existing items, and chosen different from rejected.
    """
    if missing := {"row", "chosen", "rejected"} - set(pairs.column_names):
        raise ValueError(f"the pairs have no {sorted(missing)}, only {pairs.column_names}.")
    size = model.num_session_items * model.config.num_levels
    columns = {name: pairs.with_format(None)[name][:] for name in ("row", "chosen", "rejected")}
    rows = columns["row"]
    if not rows or len(set(rows)) < len(rows) or not 0 <= min(rows) <= max(rows) < num_rows:
        raise ValueError(f"`row` must name at least one of the {num_rows} rows of train_dataset, and none twice.")
    for name, count in (("chosen", 1), ("rejected", num_rejected)):
        if wrong := {len(ids) for ids in columns[name]} - {count * size}:
            raise ValueError(
                f"`{name}` has {sorted(wrong)} token ids in some pairs: expected {count * size}, {count} times {size} "
                "codes."
            )
    chosen = torch.tensor(columns["chosen"]).view(len(rows), 1, -1, model.config.num_levels)
    rejected = torch.tensor(columns["rejected"]).view(len(rows), num_rejected, -1, model.config.num_levels)
    first = torch.tensor(model.config.level_offsets)
    both = torch.cat([chosen, rejected], dim=1)
    if bool(((both < first) | (both >= first + torch.tensor(model.config.codebook_sizes))).any()):
        raise ValueError(
            "the pairs hold token ids that are no codes of their level: they come from another tokenizer."
        )
    leaves, owner = completion_leaves(both.flatten(0, 1).flatten(1).tolist(), model.catalogue)
    if strange := len((owner[leaves < 0] // both.shape[1]).unique()):
        raise ValueError(
            f"{strange} of {len(rows)} pairs hold codes that no item of {model.catalogue} has: they come from other "
            "semantic IDs, or are no items. Make them with the policy's tokenizer, of existing items."
        )
    if same := int((chosen == rejected).flatten(2).all(2).any(1).sum()):
        raise ValueError(f"{same} of {len(rows)} pairs have chosen equal to rejected: leave them out.")


@torch.no_grad()
def candidate_log_probs(
    model: Any, rows: Any, row_ids: list[int], token_ids: torch.Tensor, collator: Any, batch_size: int
) -> torch.Tensor:
    """log M(S|H) (R, C), on the CPU, of candidates (R, C, m, L) of the rows `row_ids` (R) of a data set."""
    found = [torch.zeros(0, token_ids.shape[1])]
    for start in range(0, len(row_ids), batch_size):
        batch = context_inputs(collator([rows[i] for i in row_ids[start : start + batch_size]]))
        context = {name: value.to(model.device) for name, value in batch.items()}
        part = token_ids[start : start + batch_size].to(model.device)
        found.append(completion_log_probs(model, context, part).float().cpu())
    return torch.cat(found)


def add_reference(model: Any, pairs: datasets.Dataset, rows: Any, collator: Any, batch_size: int) -> list[dict]:
    """Given pairs (see [`check_pairs`]) with the log-probabilities of their reference, `model`."""
    columns = {name: pairs.with_format(None)[name][:] for name in ("row", "chosen", "rejected")}
    shape = (len(pairs), -1, model.num_session_items, model.config.num_levels)
    token_ids = torch.cat([torch.tensor(columns[name]).view(shape) for name in ("chosen", "rejected")], dim=1)
    log_probs = candidate_log_probs(model, rows, columns["row"], token_ids, collator, batch_size).tolist()
    return [
        dict(zip(columns, values)) | {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1:]}
        for *values, reference in zip(*columns.values(), log_probs)
    ]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers inside are a function of `seed`; outside they go on as if nothing had been drawn."""
    # the global state is what rewards may draw from
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


__all__ = [
    "add_reference",
    "candidate_log_probs",
    "check_pairs",
    "choose_pairs",
    "completion_log_probs",
    "context_inputs",
    "generate_candidates",
    "mine_pairs",
    "mining_logs",
    "seeded",
]
