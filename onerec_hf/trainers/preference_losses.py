"""Preference losses of OneRec's Table 1 (arXiv:2502.18965) on summed log-probabilities of the code tokens, BOS
excluded.

The paper names the losses and no hyper-parameter of any; the defaults are those of the losses' own papers and of TRL.
Every function takes log M(S|H) of whole sessions, (B,), in nats, and returns one loss per pair, (B,). Where a loss is
per token in TRL and a sum in its own paper (IPO, CPO), `length_normalized` chooses; sums weigh `num_tokens` times
more.
"""

import torch
import torch.nn.functional as F


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """-log sigma(beta D), D = (chosen - ref_chosen) - (rejected - ref_rejected) (OneRec eq. 10; arXiv:2305.18290)."""
    return -F.logsigmoid(beta * _margin(chosen, rejected, ref_chosen, ref_rejected))


def ipo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    num_tokens: int,
    tau: float = 0.1,
    length_normalized: bool = True,
) -> torch.Tensor:
    """
    (D - 1 / (2 tau))^2 (arXiv:2310.12036, eq. 17), or, with `length_normalized`, (D / num_tokens - 1 / (2 tau))^2:
    log-ratios per token, as TRL does. The margin that D is drawn to is `num_tokens` times larger then.
    """
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected)
    return ((margin / num_tokens if length_normalized else margin) - 1 / (2 * tau)) ** 2


def cdpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> torch.Tensor:
    """(1 - e) L(D) + e L(-D), L(D) = -log sigma(beta D): a share e of the pairs is the wrong way round (cDPO, Mitchell
    2023).
    """
    logits = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    smoothing = _checked(label_smoothing)
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def rdpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> torch.Tensor:
    """((1 - e) L(D) - e L(-D)) / (1 - 2e): unbiased under a share e of flipped pairs (robust DPO,
    arXiv:2403.00409).
    """
    logits = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    smoothing = _checked(label_smoothing)
    return (smoothing * F.logsigmoid(-logits) - (1 - smoothing) * F.logsigmoid(logits)) / (1 - 2 * smoothing)


def cpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    num_tokens: int,
    beta: float = 0.1,
    alpha: float = 1.0,
    length_normalized: bool = True,
) -> torch.Tensor:
    """
    -log sigma(beta (chosen - rejected)) - alpha chosen: no reference, and the winner's NLL (arXiv:2401.08417), or,
    with `length_normalized`, the NLL per token, as in TRL.
    """
    nll = -chosen / num_tokens if length_normalized else -chosen
    return -F.logsigmoid(beta * (chosen - rejected)) + alpha * nll


def simpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, num_tokens: int, beta: float = 2.5, gamma: float = 1.375
) -> torch.Tensor:
    """-log sigma(beta (chosen - rejected) / num_tokens - gamma): no reference (arXiv:2405.14734); both sides have
    `num_tokens`.
    """
    return -F.logsigmoid(beta * (chosen - rejected) / num_tokens - gamma)


def sdpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float = 1.0,
) -> torch.Tensor:
    """
    -log sigma(-log sum_l exp(beta ((l - ref_l) - (w - ref_w)))): S-DPO (arXiv:2406.09215), several rejected sessions
    per pair.

    Args:
        rejected, ref_rejected (`torch.Tensor` of shape (B, n)): n rejected sessions; with n = 1 this is [`dpo_loss`].
        beta (`float`, defaults to 1.0): As in the authors' script, with n = 3.
    """
    margins = _margin(chosen.unsqueeze(1), rejected, ref_chosen.unsqueeze(1), ref_rejected)  # (B, n)
    return -F.logsigmoid(-torch.logsumexp(-beta * margins, dim=1))


def _margin(chosen, rejected, ref_chosen, ref_rejected):
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _checked(label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: the share of flipped pairs must lie in [0, 0.5).")
    return label_smoothing


__all__ = ["cdpo_loss", "cpo_loss", "dpo_loss", "ipo_loss", "rdpo_loss", "sdpo_loss", "simpo_loss"]
