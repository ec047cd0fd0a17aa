"""Settings of Iterative Preference Alignment (OneRec, Algorithm 2 and Table 1, arXiv:2502.18965)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from trl import DPOConfig

from . import preference_losses as losses
from .next_item import NOT_READ, NextItemArguments, refuse_unread

# beta of each loss where none is given: those of the losses' own papers and of TRL (IPO's is its tau)
DEFAULT_BETA = {"dpo": 0.1, "ipo": 0.1, "cdpo": 0.1, "rdpo": 0.1, "cpo": 0.1, "simpo": 2.5, "sdpo": 1.0}

_READ_BY = {
    "label_smoothing": ["cdpo", "rdpo"],
    "simpo_gamma": ["simpo"],
    "cpo_alpha": ["cpo"],
    "length_normalized": ["ipo", "cpo"],
}
_REFERENCE = "the reference is the model that made an iteration's pairs; its log-probabilities are stored with them"
_TABLE_1 = "the losses are those of OneRec's Table 1, one at a time"
IPA_NOT_READ = NOT_READ | {"precompute_ref_batch_size": "mining_batch_size says how many users are taken at once"}
IPA_NOT_READ |= dict.fromkeys(
    ("precompute_ref_log_probs", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERENCE
)
IPA_NOT_READ |= dict.fromkeys(
    ("loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "discopop_tau"),
    _TABLE_1,
)


@dataclass
class IPAConfig(NextItemArguments, DPOConfig):
    r"""
    TRL's `DPOConfig` plus Algorithm 2. One epoch is one iteration: `num_train_epochs` is the paper's T, the rows of
    the training set are its N_sample, the weights at the start of an epoch are M_t. Fields of TRL's config that
    nothing here reads are refused.

    The paper gives N = 128 and r_DPO = 1% and neither beta, lambda, T, N_sample nor the hyper-parameters of any other
    loss.

    Args:
        remove_unused_columns, label_names, hub_strategy, learning_rate, weight_average_decay, ...: See
            [`OneRecSFTConfig`].
        train_sampling_strategy: Random, as in Algorithm 2.
        ddp_broadcast_buffers: Off: a process whose batch has no pair runs one forward pass less, so passes must not
            wait for each other. The only buffers, router biases, are equal everywhere without it.
        dpo_ratio (`float`, defaults to 0.01): r_DPO, the share of the rows that get a pair, drawn anew in every
            iteration.
        num_candidates (`int`, defaults to 128): N, beams per user.
        loss_type (`str`, defaults to `"dpo"`): Of Table 1: `"dpo"`, `"ipo"`, `"cdpo"`, `"rdpo"`, `"cpo"`, `"simpo"`,
            `"sdpo"`. TRL calls `"dpo"` `sigmoid` and `"rdpo"` `robust`.
        num_rejected (`int`, defaults to 1): Rejected candidates per pair; more than one for `"sdpo"` only (its
            authors: 3).
        beta (`float`, *optional*): Of the loss; defaults to [`DEFAULT_BETA`].
        preference_weight (`float`, defaults to 1.0): lambda. In our simulated worlds 1 / `dpo_ratio` with pairs for 1%
            of the rows did nearly what 1 did with pairs for all of them, and 1 with 1% next to nothing
            (docs/results.md).
        label_smoothing (`float`, defaults to 0.1): Share of flipped pairs that `"cdpo"` and `"rdpo"` assume.
        simpo_gamma (`float`, defaults to 1.375): Margin of `"simpo"`.
        cpo_alpha (`float`, defaults to 1.0): Weight of the winner's negative log-likelihood in `"cpo"`.
        length_normalized (`bool`, defaults to `True`): `"ipo"` and `"cpo"` per token of a session, as in TRL. `False`:
            as in their own papers, where the margin of IPO is smaller by the number of tokens and the likelihood in
            CPO weighs more by it.
        disable_dropout (`bool`, defaults to `True`): As TRL does, so that the ratio to the reference starts at 1.
        precompute_ref_log_probs: On, and not to be changed: pairs are stored with the log-probabilities of their
            reference.
        mining_batch_size (`int`, defaults to 32): Users per beam search and process.
        kl_users (`int`, defaults to 64): Rows, fixed for the run, on which the divergence from the seed model is
            estimated; 0 for none.
    """

    train_sampling_strategy: str = field(default="random")
    ddp_broadcast_buffers: bool | None = field(default=False)
    dpo_ratio: float = field(default=0.01)
    num_candidates: int = field(default=128)
    # TRL: a list
    loss_type: Literal["dpo", "ipo", "cdpo", "rdpo", "cpo", "simpo", "sdpo"] = field(  # type: ignore[assignment]
        default="dpo"
    )
    num_rejected: int = field(default=1)
    beta: float | None = field(default=None)  # filled in below
    preference_weight: float = field(default=1.0)
    label_smoothing: float = field(default=0.1)
    simpo_gamma: float = field(default=1.375)
    cpo_alpha: float = field(default=1.0)
    length_normalized: bool = field(default=True)
    disable_dropout: bool = field(default=True)
    precompute_ref_log_probs: bool = field(default=True)
    mining_batch_size: int = field(default=32)
    kl_users: int = field(default=64)

    def __post_init__(self):
        if self.loss_type not in DEFAULT_BETA:
            raise ValueError(f"loss_type={self.loss_type!r}: allowed are {sorted(DEFAULT_BETA)}.")
        refuse_unread(self, IPA_NOT_READ)
        others = {name: kinds for name, kinds in _READ_BY.items() if self.loss_type not in kinds}
        refuse_unread(
            self, {name: f"loss_type={self.loss_type!r} has none, {kinds} read it" for name, kinds in others.items()}
        )
        if not 0 < self.dpo_ratio <= 1:
            raise ValueError(f"dpo_ratio={self.dpo_ratio}: the share of rows with a pair must lie in (0, 1].")
        if self.num_rejected < 1 or (self.num_rejected > 1 and self.loss_type != "sdpo"):
            raise ValueError(f"num_rejected={self.num_rejected}: 1, or more with loss_type='sdpo'.")
        if self.num_candidates <= self.num_rejected:
            raise ValueError(
                f"num_candidates={self.num_candidates}: a pair needs at least num_rejected + 1 = "
                f"{self.num_rejected + 1}."
            )
        if self.beta is None:
            self.beta = DEFAULT_BETA[self.loss_type]
        loss_type = self.loss_type
        super().__post_init__()
        self.loss_type = loss_type  # of which TRL makes a list

    def preference_loss(
        self,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        ref_chosen: torch.Tensor,
        ref_rejected: torch.Tensor,
        num_tokens: int,
    ) -> torch.Tensor:
        """The loss of each pair, (P,), from summed log-probabilities: chosen (P,), rejected (P, n), and the
        reference's.
        """
        if self.loss_type == "sdpo":
            return losses.sdpo_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta)
        both = (chosen, rejected[:, 0])
        pair = (*both, ref_chosen, ref_rejected[:, 0])
        match self.loss_type:
            case "dpo":
                return losses.dpo_loss(*pair, self.beta)
            case "ipo":
                return losses.ipo_loss(*pair, num_tokens, self.beta, self.length_normalized)
            case "cdpo":
                return losses.cdpo_loss(*pair, self.beta, self.label_smoothing)
            case "rdpo":
                return losses.rdpo_loss(*pair, self.beta, self.label_smoothing)
            case "cpo":
                return losses.cpo_loss(*both, num_tokens, self.beta, self.cpo_alpha, self.length_normalized)
            case "simpo":
                return losses.simpo_loss(*both, num_tokens, self.beta, self.simpo_gamma)


__all__ = ["DEFAULT_BETA", "IPAConfig"]
