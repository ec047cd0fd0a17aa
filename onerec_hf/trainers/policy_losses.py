"""Policy-gradient losses: GRPO, ECPO (OneRec Technical Report, arXiv:2506.13695) and GBPO (OneRec-V2,
arXiv:2508.20900).

ECPO and GBPO only change the denominator of the ratio, pi_old -> pi'_old, so each is a rule for the behaviour
log-probabilities; a trainer that knows the clipped loss needs nothing else. All functions are elementwise: `log_probs`
may be those of tokens (B, C) or of whole items (B,), `advantages` broadcasts to them. The papers do not say which
ratio ECPO takes; GBPO's derivation is per token, and has to be: with the probability of a whole item (about 1e-6) a
negative would teach nothing.

Legend: B samples, G samples of a group, C tokens of a completion.
"""

import torch


def group_advantages(rewards_BG: torch.Tensor) -> torch.Tensor:
    """
    A_i = (r_i - mean(r)) / std(r) over each group (Technical Report, ECPO), std being the population's.

    Args:
        rewards_BG (`torch.Tensor` of shape (B, G)): Rewards; NaN for a sample without one, which has no part in mean
            and std.

    Returns:
        `torch.Tensor` of shape (B, G); exactly 0 in a group whose rewards are all equal, and where there is no reward.
    """
    known = ~rewards_BG.isnan()
    count = known.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(known, rewards_BG - rewards_BG.nansum(1, keepdim=True) / count, 0.0)
    # not std == 0: the mean of equal floats can be off by a rounding error, which the division would blow up to +-1
    high, low = (rewards_BG.masked_fill(~known, side) for side in (-torch.inf, torch.inf))
    equal = high.amax(1, keepdim=True) <= low.amin(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(equal, 0.0, centred / std.masked_fill(equal, 1.0))


def reward_advantages(rewards: torch.Tensor, group_size: int, unnormalized: torch.Tensor) -> torch.Tensor:
    """
    Advantages of completions from the weighted rewards of several functions: the sum of those to be normalised, over
    the group, and the others added to it as they are.

    Args:
        rewards (`torch.Tensor` of shape (R, F)): NaN where a function gives no reward. The G completions of a user are
            adjacent.
        unnormalized (`torch.BoolTensor` of shape (F,)): Functions whose rewards are advantages already.

    Returns:
        `torch.Tensor` of shape (R,); 0 where no function gave a reward.
    """
    compared = rewards[:, ~unnormalized]
    compared = compared.nansum(1).masked_fill(compared.isnan().all(1), torch.nan)
    return group_advantages(compared.view(-1, group_size)).flatten() + rewards[:, unnormalized].nansum(1)


def log_complement(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - p) from log p <= 0, accurate at both ends (Maechler 2012): -inf at p = 1, -p for tiny p."""
    log_probs = log_probs.clamp(max=0.0)
    return torch.where(
        log_probs > -0.6931,  # p > 1/2: 1 - p loses digits, -expm1 does not
        torch.log(-torch.expm1(log_probs)),
        torch.log1p(-torch.exp(log_probs)),
    )


def behaviour_log_probs(log_probs: torch.Tensor, logged_log_probs: torch.Tensor) -> torch.Tensor:
    """log pi_old: what was logged at exposure, and sg(log pi) where it is NaN, i.e. another pipeline chose the item
    (OneRec-V2).
    """
    return torch.where(logged_log_probs.isnan(), log_probs.detach(), logged_log_probs)


def ecpo_old_log_probs(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, epsilon: float = 0.2, delta: float = 0.1
) -> torch.Tensor:
    """
    log pi'_old with pi'_old = max(sg(pi) / (1 + epsilon + delta), pi_old) (Technical Report, ECPO): no ratio is above
    1 + epsilon + delta.

    Only negative advantages feel it, since the clip stops positive ones at 1 + epsilon already. `epsilon` is not in
    the paper, 0.2 is customary; `delta` = 0.1 is the paper's.
    """
    if not delta > 0:
        raise ValueError(f"delta={delta}: must be above 0; the paper's value is 0.1.")
    bound = torch.log1p(torch.tensor(epsilon + delta, dtype=log_probs.dtype, device=log_probs.device))
    return torch.maximum(log_probs.detach() - bound, old_log_probs)


def gbpo_old_log_probs(log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """
    log pi'_old with pi'_old = max(pi_old, sg(pi)) for A >= 0 and max(pi_old, 1 - sg(pi)) for A < 0 (OneRec-V2, GBPO).

    So the gradient of a token's probability is at most that of binary cross-entropy: 1 / pi for a positive, 1 / (1 -
    pi) for a negative. Computed from logarithms alone; pi may be 1, or too small for a float.
    """
    current = log_probs.detach()
    return torch.maximum(old_log_probs, torch.where(advantages < 0, log_complement(current), current))


def grpo_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, epsilon: float = 0.2
) -> torch.Tensor:
    """
    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) with rho = pi / pi_old, elementwise, to be minimised.

    Args:
        log_probs (`torch.Tensor`): log pi of the current policy, with gradient.
        old_log_probs (`torch.Tensor` of the same shape): log pi_old of the policy that sampled, without.
        advantages (`torch.Tensor`, broadcastable): A.
    """
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def ecpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float = 0.2,
    delta: float = 0.1,
) -> torch.Tensor:
    """[`grpo_loss`] with the early-clipped denominator of [`ecpo_old_log_probs`]."""
    return grpo_loss(log_probs, ecpo_old_log_probs(log_probs, old_log_probs, epsilon, delta), advantages, epsilon)


def gbpo_loss(log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """-A pi / pi'_old with the denominator of [`gbpo_old_log_probs`] and no clip of the ratio; elementwise, to be
    minimised.
    """
    return -(log_probs - gbpo_old_log_probs(log_probs, old_log_probs, advantages)).exp() * advantages


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    loss_type: str,
    epsilon: float = 0.2,
    delta: float = 0.1,
) -> torch.Tensor:
    """[`grpo_loss`], [`ecpo_loss`] or [`gbpo_loss`] by name."""
    if loss_type == "gbpo":
        return gbpo_loss(log_probs, old_log_probs, advantages)
    if loss_type == "ecpo":
        return ecpo_loss(log_probs, old_log_probs, advantages, epsilon, delta)
    return grpo_loss(log_probs, old_log_probs, advantages, epsilon)


def policy_loss_metrics(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    loss_type: str,
    epsilon: float = 0.2,
    delta: float = 0.1,
) -> dict[str, torch.Tensor]:
    """
    What the rule does to a batch; codes with an advantage of 0, or `mask` 0, do not count.

    Returns:
        `bound_fraction`, the share of codes whose pi_old was raised to pi'_old; `clip_fraction` (not of GBPO), of
        those whose gradient the clip removed; `weight/positive` and `weight/negative`, the largest |d loss / d log pi|
        / |A| of a code (NaN where there is none): 1 for REINFORCE; for GBPO at most 1 where A > 0, and pi / (1 - pi)
        where A < 0.
    """
    leaf = log_probs.detach().requires_grad_()
    with torch.enable_grad():
        loss = policy_loss(leaf, old_log_probs, advantages, loss_type, epsilon, delta)
        weight = torch.autograd.grad(loss.sum(), leaf)[0].abs()
    used = old_log_probs
    if loss_type == "gbpo":
        used = gbpo_old_log_probs(log_probs, old_log_probs, advantages)
    elif loss_type == "ecpo":
        used = ecpo_old_log_probs(log_probs, old_log_probs, epsilon, delta)
    advantages = advantages.expand(log_probs.shape)
    counted = mask.bool() & (advantages != 0)
    metrics = {"bound_fraction": (used > old_log_probs)[counted].float().mean()}
    if loss_type != "gbpo":
        metrics["clip_fraction"] = (weight == 0)[counted].float().mean()
    for name, side in (("positive", advantages > 0), ("negative", advantages < 0)):
        relative = (weight / advantages.abs())[counted & side]
        metrics[f"weight/{name}"] = relative.max() if len(relative) else torch.tensor(torch.nan)
    return metrics


__all__ = [
    "behaviour_log_probs",
    "ecpo_loss",
    "ecpo_old_log_probs",
    "gbpo_loss",
    "gbpo_old_log_probs",
    "group_advantages",
    "grpo_loss",
    "log_complement",
    "policy_loss",
    "policy_loss_metrics",
    "reward_advantages",
]
