"""Reward functions with TRL's signature: `fn(prompts, completions, completion_ids, **columns) -> list[float]`.

OneRec Technical Report (arXiv:2506.13695), reward system: P-Score, format and industrial rewards. Every reward is
bound to its sample: completion i is judged by entry i of the columns, never by looking its history up.

Legend: R completions, G completions of one sample (adjacent rows), L levels, C tokens of a completion.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from ..models.catalogue import Catalogue
from ..models.configuration_onerec import NUM_SPECIAL_TOKENS

RewardFunction = Callable[..., Sequence[float | None]]


def completion_leaves(
    completion_ids: Sequence[Sequence[int]], catalogue: Catalogue
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The items that completions spell, as leaves of the catalogue (a leaf is one semantic ID, see [`Catalogue`]).

    Special tokens (BOS in front of each item of a session, end, padding) are skipped.

    Args:
        completion_ids (`Sequence[Sequence[int]]`): R lists of token ids, of any lengths: L for each item.
        catalogue (`Catalogue`): The existing items.

    Returns:
        `leaves` and `owner`, both `torch.LongTensor` of shape (items of all completions,) on the CPU: `owner` is the
        completion, 0 to R - 1. A leaf is -1 where no item has the semantic ID. Tokens that are no whole semantic IDs,
        or none at all, are one leaf of -1, behind all others.
    """
    rows, levels = len(completion_ids), catalogue.num_levels
    sizes = torch.tensor(catalogue.codebook_sizes)
    lengths = torch.tensor([len(ids) for ids in completion_ids], dtype=torch.long)
    tokens = torch.tensor([token for ids in completion_ids for token in ids], dtype=torch.long)
    owner = torch.arange(rows).repeat_interleave(lengths)
    tokens, owner = tokens[tokens >= NUM_SPECIAL_TOKENS], owner[tokens >= NUM_SPECIAL_TOKENS]
    count = owner.bincount(minlength=rows)
    whole = (count > 0) & (count % levels == 0)
    # a code on the wrong level falls outside its codebook, so no item has it
    codes = tokens[whole[owner]].view(-1, levels) - (NUM_SPECIAL_TOKENS + sizes.cumsum(0) - sizes)
    leaves = catalogue.leaves_of(codes).cpu() if len(codes) else codes.new_empty(0)
    broken = (~whole).nonzero()[:, 0]
    leaves = torch.cat([leaves, broken.new_full(broken.shape, -1)])
    return leaves, torch.cat([owner[whole[owner]][::levels], broken])


def is_legal(completion_ids: Sequence[Sequence[int]], catalogue: Catalogue) -> torch.Tensor:
    """
    Whether each completion spells existing items only, and at least one.

    Args:
        completion_ids (`Sequence[Sequence[int]]`): R lists of token ids, as [`completion_leaves`] takes them.
        catalogue (`Catalogue`): The existing items.

    Returns:
        `torch.BoolTensor` of shape (R,) on the CPU.
    """
    leaves, owner = completion_leaves(completion_ids, catalogue)
    return owner[leaves < 0].bincount(minlength=len(completion_ids)) == 0


def select_for_format(
    num_groups: int,
    group_size: int,
    num_samples: int,
    log_probs: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Which K of each group's G samples the format reward looks at (Technical Report, format reward).

    Args:
        num_samples (`int`): K, 1 to `group_size`.
        log_probs (`torch.Tensor` of shape (num_groups, group_size), *optional*): Then the K most probable samples, the
            variant whose legality the paper saw rise and fall again; otherwise K at random, the paper's choice.

    Returns:
        `torch.BoolTensor` of shape (num_groups, group_size), K True per row.
    """
    if not 1 <= num_samples <= group_size:
        raise ValueError(f"num_samples={num_samples}: K must be between 1 and the {group_size} samples of a group.")
    score = torch.rand(num_groups, group_size, generator=generator) if log_probs is None else log_probs.cpu()
    selected = torch.zeros(num_groups, group_size, dtype=torch.bool)
    return selected.scatter_(1, score.topk(num_samples, dim=1).indices, True)


class FormatReward:
    r"""
    1.0 for a selected legal sample, 0.0 for a selected illegal one (discarded, never punished), `None` for one not
    selected.

    OneRec Technical Report, format reward: these numbers are advantages, so they are not normalised over the group; a
    trainer that normalises must add them afterwards. TRL leaves `None` out of its means, so the mean it logs is the
    legality of the selection.

    Args:
        catalogue (`Catalogue`): The existing items.
        num_generations (`int`): G, completions per sample, adjacent. A call with a column `num_generations`, as a
            trainer's whose evaluation has other groups, says otherwise for itself.
        num_samples (`int`, defaults to 5): K, all of a smaller group; the paper's test takes 5 of 128, the production
            value is not in the paper.
        selection: `"random"` (the paper's choice) or `"top"`, the K most probable, which needs the summed
            log-probabilities of the completions as the column `sample_log_probs` (of a TRL `rollout_func`).
        seed (`int`, *optional*): Of the random selection; default torch's global generator, which checkpoints of a
            trainer hold.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        num_generations: int,
        num_samples: int = 5,
        selection: Literal["random", "top"] = "random",
        seed: int | None = None,
    ):
        if selection not in ("random", "top"):
            raise ValueError(f"selection={selection!r}: allowed are 'random' and 'top'.")
        if not 1 <= num_samples <= num_generations:
            raise ValueError(f"num_samples={num_samples}: K must be between 1 and num_generations={num_generations}.")
        self.catalogue, self.num_generations, self.num_samples = catalogue, num_generations, num_samples
        self.selection, self.needs_sample_log_probs = selection, selection == "top"
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.__name__ = "format_reward"

    def __call__(
        self,
        prompts: Sequence | None = None,
        completions: Sequence | None = None,
        completion_ids: Sequence[Sequence[int]] = (),
        sample_log_probs: Sequence | None = None,
        num_generations: Sequence[int] | None = None,
        **columns,
    ) -> Sequence[float | None]:
        size = self.num_generations if num_generations is None else num_generations[0]
        groups = num_groups(len(completion_ids), size)
        log_probs = None
        if self.selection == "top":
            if sample_log_probs is None:
                raise ValueError("selection='top' needs the column sample_log_probs, one number per completion.")
            log_probs = torch.as_tensor(sample_log_probs, dtype=torch.float32).view(groups, size)
        selected = select_for_format(groups, size, min(self.num_samples, size), log_probs, self.generator)
        legal = is_legal(completion_ids, self.catalogue)
        return [float(good) if chosen else None for good, chosen in zip(legal.tolist(), selected.flatten().tolist())]


class HitReward:
    r"""
    1.0 where the completion holds a target of **its own** sample, else 0.0.

    Args:
        column (`str`, defaults to `"target_ids"`): Column with each sample's targets: the L tokens of one item, or a
            list of such lists, of which any counts. Special tokens in the completion are skipped; of a session any
            item counts.
        catalogue (`Catalogue`, *optional*): Then a completion that spells no item, or a session with one that does not
            exist, has no reward (`None`) instead of 0.0, which a trainer would punish beside a hit.
    """

    def __init__(self, column: str = "target_ids", catalogue: Catalogue | None = None):
        self.column, self.catalogue, self.__name__ = column, catalogue, "hit_reward"

    def __call__(
        self,
        prompts: Sequence | None = None,
        completions: Sequence | None = None,
        completion_ids: Sequence[Sequence[int]] = (),
        **columns,
    ) -> Sequence[float | None]:
        targets = own_column(columns, self.column, len(completion_ids))
        rewards = []
        for ids, target in zip(completion_ids, targets):
            several = len(target) and hasattr(target[0], "__len__")
            wanted = {tuple(item) for item in (target if several else [target]) if len(item)}
            codes, size = [token for token in ids if token >= NUM_SPECIAL_TOKENS], len(next(iter(wanted), (0,)))
            items = (
                {tuple(codes[i : i + size]) for i in range(0, len(codes), size)} if len(codes) % size == 0 else set()
            )
            rewards.append(float(bool(items & wanted)))
        if self.catalogue is None:
            return rewards
        legal = is_legal(completion_ids, self.catalogue).tolist()
        return [reward if good else None for reward, good in zip(rewards, legal)]


class IndustrialReward:
    r"""
    Another reward, scaled down for a class of items while that class takes more than its quota: r' = alpha r
    (Technical Report, industrial reward; the values of quota and factor are not in the paper).

    The share is counted over the completions of one call, a rollout batch, that spell an item; a session belongs to
    the class when one of its items does.

    Args:
        reward: The reward function to scale; its rewards must be 0 or more, since scaling a negative one would be a
            prize.
        catalogue (`Catalogue`): To read items from completions.
        tagged (`torch.BoolTensor` of shape (N,)): The class, by item index; a semantic ID is of the class when one of
            its items is.
        quota (`float`): The paper's f, a share in [0, 1].
        factor (`float`): The paper's alpha, in (0, 1).
    """

    def __init__(
        self, reward: RewardFunction, catalogue: Catalogue, tagged: torch.Tensor, quota: float, factor: float
    ):
        if not 0 <= quota <= 1 or not 0 < factor < 1:
            raise ValueError(f"quota={quota} must lie in [0, 1] and factor={factor} in (0, 1).")
        if tuple(tagged.shape) != (catalogue.num_items,):
            raise ValueError(
                f"tagged has shape {tuple(tagged.shape)}: expected one value per item, ({catalogue.num_items},)."
            )
        self.reward, self.catalogue, self.quota, self.factor = reward, catalogue, quota, factor
        leaf = catalogue.leaves_of(catalogue.semantic_ids.long().cpu()).cpu()
        self.tagged_leaf = torch.zeros(catalogue.num_semantic_ids, dtype=torch.bool)
        self.tagged_leaf[leaf[tagged.cpu().bool()]] = True
        self.__name__ = "industrial_reward"

    def __call__(
        self,
        prompts: Sequence | None = None,
        completions: Sequence | None = None,
        completion_ids: Sequence[Sequence[int]] = (),
        **columns,
    ) -> Sequence[float | None]:
        rewards = self.reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        if negative := [r for r in rewards if r is not None and r < 0]:
            raise ValueError(
                f"{len(negative)} rewards are negative, such as {negative[0]}: scaling them down would reward the "
                "class."
            )
        leaves, owner = completion_leaves(completion_ids, self.catalogue)
        hits = (leaves >= 0) & self.tagged_leaf[leaves.clamp(min=0)]
        tagged, real = (owner[mask].bincount(minlength=len(completion_ids)) > 0 for mask in (hits, leaves >= 0))
        if tagged.sum() <= self.quota * real.sum():
            return rewards
        return [self.factor * r if r is not None and hit else r for r, hit in zip(rewards, tagged.tolist())]


def finite_or_none(function: RewardFunction) -> RewardFunction:
    """
    A reward function that refuses what is no number: TRL would take NaN for "no reward", which is `None`, and one
    infinite reward makes every advantage of its group NaN. Reward modules, names of models and asynchronous functions
    come back as they are.

    Raises:
        ValueError: On a call, naming the function and the first such completion.
    """
    if not callable(function) or isinstance(function, torch.nn.Module):
        return function
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return function

    @functools.wraps(function)
    def checked(*args, **kwargs):
        rewards = function(*args, **kwargs)
        for place, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise ValueError(
                    f"the reward function {getattr(function, '__name__', function)!r} returned {reward} for "
                    f"completion {place}: rewards must be finite, or None for a completion that shall have none."
                )
        return rewards

    return checked


def num_groups(rows: int, group_size: int) -> int:
    """How many groups `rows` completions are."""
    if rows % group_size:
        raise ValueError(f"{rows} completions are no whole groups of num_generations={group_size}.")
    return rows // group_size


def own_column(columns: Mapping[str, Sequence], name: str, rows: int) -> Sequence:
    """A column of the samples, one value per completion."""
    if name not in columns:
        raise ValueError(f"the samples have no column {name!r}; they have {sorted(columns)}. Keep it in the data set.")
    if len(columns[name]) != rows:
        raise ValueError(
            f"column {name!r} has {len(columns[name])} values for {rows} completions: one each is needed."
        )
    return columns[name]


__all__ = [
    "FormatReward",
    "HitReward",
    "IndustrialReward",
    "completion_leaves",
    "finite_or_none",
    "is_legal",
    "select_for_format",
]
