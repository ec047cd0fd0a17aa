"""Settings of RL with GRPO, ECPO (OneRec Technical Report, arXiv:2506.13695) or GBPO (OneRec-V2, arXiv:2508.20900)."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from .next_item import NOT_READ, refuse_unread

LOSS_TYPES = ("grpo", "ecpo", "gbpo")
ROLLOUTS = ("beam", "unconstrained_beam", "sample", "tree", "unconstrained")
_TEXT = "candidates are semantic IDs, which the model's own search finds (rollout)"
_LOSSES = "the losses are those of the papers (loss_type)"
_CODES = (
    "min_p repetition_penalty generation_kwargs chat_template_kwargs cache_implementation max_completion_length "
    "use_vllm mask_truncated_completions max_tool_calling_iterations use_transformers_continuous_batching "
    "use_transformers_paged"
).split()
_OTHER_LOSSES = (
    "epsilon_high importance_sampling_level multi_objective_aggregation scale_rewards top_entropy_quantile "
    "entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target "
    "off_policy_mask_threshold use_bias_correction_kl cast_lm_head_to_fp32 sapo_temperature_neg "
    "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
).split()
_SHARED = (
    "label_smoothing_factor router_aux_loss_coef use_liger_kernel include_for_metrics batch_eval_metrics do_predict"
).split()
GRPO_NOT_READ = {
    **dict.fromkeys(_CODES, _TEXT),
    **dict.fromkeys(_OTHER_LOSSES, _LOSSES),
    **{name: NOT_READ[name] for name in _SHARED},
    "train_sampling_strategy": "users come in random order, each of them once for every candidate of its group",
}


@dataclass
class OneRecGRPOConfig(GRPOConfig):
    r"""
    TRL's `GRPOConfig` with the losses and rollouts of OneRec. The objective is

        rl_weight * ((1 - logged_weight) * L_on_policy + logged_weight * L_logged) + sft_weight * L_SFT

    Neither paper reports a weight, a learning rate of RL or (for feedback samples) a group size.

    Args:
        loss_type: `"ecpo"` (Technical Report, default), `"gbpo"` (OneRec-V2) or `"grpo"`. With each of them the
            rewards of a group are normalised to advantages, so that the worse half of a group is negative: what is
            used as it is, is a property of a reward (`unnormalized_rewards`, the advantages of `logged_dataset`) and
            not of the loss.
        logged_loss_type (`str`, *optional*): Of logged exposures, where it shall be another one than `loss_type` of
            rollouts.
        epsilon: Clip range of GRPO and ECPO; not in the paper, 0.2 is customary.
        delta (`float`, defaults to 0.1): ECPO's early clip: no ratio is above 1 + epsilon + delta (the paper's value).
            TRL's option of the same name is another rule, which drops such samples.
        rollout: How the G = `num_generations` candidates of a user are made: `"beam"` (the G best items; the Technical
            Report found it better than sampling), `"sample"` (constrained, may repeat), `"tree"` (constrained, all
            different), `"unconstrained"` (samples of codes that may belong to no item; what the format reward is for)
            or `"unconstrained_beam"` (the G most probable codes of a beam search, item or not: the report's beams have
            no constraint). Log-probabilities are the policy's own in each case.
        top_k, top_p: `"sample"` and `"unconstrained"` draw each code from the k most probable, or from the fewest that
            have the probability p together; both together are the report's other search. 0 and 1 cut nothing.
        temperature: Of the sampling alone. Ratios, entropy and KL are those of the policy as it serves, at temperature
            1.
        steps_per_generation: Parameters of the rollouts are refreshed after so many micro-batches (times
            `num_iterations`); the default is every optimizer step. The Technical Report pushes parameters every 1000
            steps.
        unnormalized_rewards: Names of reward functions whose values are advantages already: added after the
            normalisation. A reward that is never negative, as a P-Score, would only ever raise probabilities so.
        logged_weight (`float`, defaults to 0): Share of logged exposures in the policy loss, 0 to 1; 1 does no
            rollouts.
        logged_batch_size (`int`, defaults to 32): Rows of `logged_dataset` per micro-batch and process.
        rl_weight, sft_weight (`float`, default to 1 and 0): Weights of the two losses.
        sft_batch_size (`int`, defaults to 32): Rows of `sft_dataset` per micro-batch and process.
        sign_norm_steps (`int`, defaults to 20): Every so many micro-batches the gradient is also taken for positive
            and for negative advantages alone, two more backward passes; 0 is never.
        per_device_train_batch_size: Candidates per micro-batch, whole groups: a multiple of `num_generations`, since
            the candidates of a user share one pass over the context.
        hub_strategy: `"end"`: one commit of the finished model; the checkpoints before it would be no complete
            repositories.
        beta: Weight of KL(policy || reference), 0 in both papers. The policy must come from a folder, which is the
            reference.
    """

    loss_type: str = field(default="ecpo", metadata={"help": f"One of {', '.join(LOSS_TYPES)}."})
    logged_loss_type: str | None = field(
        default=None, metadata={"help": "Loss of logged exposures; default that of the rollouts."}
    )
    delta: float = field(default=0.1, metadata={"help": "ECPO's early clip; the paper's value."})
    rollout: str = field(default="beam", metadata={"help": f"One of {', '.join(ROLLOUTS)}."})
    unnormalized_rewards: list[str] = field(
        default_factory=lambda: ["format_reward"], metadata={"help": "Reward functions that give advantages."}
    )
    logged_weight: float = field(default=0.0, metadata={"help": "Share of logged exposures in the policy loss."})
    logged_batch_size: int = field(default=32, metadata={"help": "Rows of logged exposures per micro-batch."})
    rl_weight: float = field(default=1.0, metadata={"help": "Weight of the policy loss."})
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the supervised loss."})
    sft_batch_size: int = field(default=32, metadata={"help": "Supervised rows per micro-batch."})
    sign_norm_steps: int = field(
        default=20, metadata={"help": "Micro-batches between gradient norms by sign; 0: never."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "So that the ratio on policy is exactly 1."})
    gradient_checkpointing: bool | None = field(  # not False, of which transformers says that the name is old
        default=None, metadata={"help": "Off by default: of three tokens a row it saves little."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "One commit of the finished model."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run goes on with the patience that its callbacks have left."}
    )
    bf16: bool = field(default=False, metadata={"help": "As in transformers; TRL's default is True."})

    def __post_init__(self):
        refuse_unread(self, GRPO_NOT_READ)
        if self.pad_to_multiple_of not in (None, "auto"):  # the default, and what TRL makes of it
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} would do nothing: {_TEXT}. Leave it out.")
        allowed_values = {"loss_type": LOSS_TYPES, "logged_loss_type": (None, *LOSS_TYPES), "rollout": ROLLOUTS}
        for name, allowed in allowed_values.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(map(str, allowed))}.")
        if (self.top_k or self.top_p != 1) and self.rollout not in ("sample", "unconstrained"):
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p} with rollout={self.rollout!r}: they cut what samples are "
                "drawn from. Take the rollout sample or unconstrained, or leave them out."
            )
        if self.logged_loss_type is not None and self.logged_weight == 0:
            raise ValueError(
                f"logged_loss_type={self.logged_loss_type!r} with logged_weight=0: nothing logged is trained on. "
                "Leave it out, or give a weight and logged_dataset."
            )
        if not 0 <= self.logged_weight <= 1:
            raise ValueError(
                f"logged_weight={self.logged_weight}: a share between 0 (on-policy) and 1 (logged alone)."
            )
        if not self.delta > 0:
            raise ValueError(f"delta={self.delta}: must be above 0; the paper's value is 0.1.")
        if self.logged_weight == 1 and self.max_steps <= 0:
            raise ValueError("logged_weight=1 does no rollouts, so no epoch ends the training: set max_steps.")
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} must be a multiple of "
                f"num_generations={self.num_generations}: the candidates of a user share one pass over the context."
            )
        super().__post_init__()


def check_reference(model: Any, args: OneRecGRPOConfig, peft_config: Any) -> None:
    """Raises where `beta` asks for a reference that lies nowhere: of an adapter it is the base, else TRL loads it from
    a folder.
    """
    adapter = peft_config is not None or hasattr(model, "peft_config")
    if args.beta and not adapter and not model.config._name_or_path:
        raise ValueError(
            f"beta={args.beta}: the reference is loaded from the folder that the policy came from, and this policy "
            "was never saved. `model.save_pretrained(folder)`, then give the folder as `model`; or leave out beta, as "
            "both papers do."
        )


def check_policy(policy: Any, args: OneRecGRPOConfig, reward_names: list[str]) -> None:
    """Raises where the settings name rewards that are not there, or ask of a policy what it has not."""
    unknown = sorted({*args.unnormalized_rewards} - {*reward_names, "format_reward"})
    if unknown and args.logged_weight < 1:
        raise ValueError(
            f"unnormalized_rewards={unknown}: the reward functions are {reward_names}. Name some of these."
        )
    if policy.catalogue is None:
        raise ValueError(f"{type(policy).__name__} has no catalogue: set `model.catalogue`, or load it from a folder.")
    if args.rollout.startswith("unconstrained") and policy.config.score_normalization == "valid":
        raise ValueError(
            f"rollout={args.rollout!r} with score_normalization='valid': codes of no item have no probability there. "
            "Train the policy with score_normalization='level', or use a constrained rollout."
        )
    different = math.prod(policy.config.codebook_sizes)
    if args.rollout == "unconstrained_beam" and different < args.num_generations:
        raise ValueError(
            f"num_generations={args.num_generations}: the codebooks {policy.config.codebook_sizes} have {different} "
            "different codes. Lower it."
        )


__all__ = ["OneRecGRPOConfig", "check_policy", "check_reference"]
