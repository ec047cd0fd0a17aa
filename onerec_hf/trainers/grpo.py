"""Reinforcement learning of a OneRec model: ECPO (OneRec Technical Report, arXiv:2506.13695), GBPO (OneRec-V2,
arXiv:2508.20900).

TRL's `GRPOTrainer` keeps the sampler, the buffer of rollouts, rewards, reference, PEFT and logging; rollouts are its
public `rollout_func`, and the loss is ours, because its ratio is pi(code | prefix, user) within the level. Legend: B
users, G candidates of a user, R = B * G rows, C tokens of a completion, n exposures of a user, L levels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm
from trl import GRPOTrainer

from ..rewards import finite_or_none
from ..rewards.spelled import ITEM_IDS, check_columns, spelled_items
from .base import OneRecTrainer, rows_counted_here
from .given import complete
from .grpo_config import OneRecGRPOConfig, check_policy, check_reference
from .grpo_rollouts import (
    EndlessBatches,
    chunks,
    load_rollouts,
    no_reward,
    pad_logged,
    places,
    record_rewards,
    rollout,
    rollout_metrics,
    save_rollouts,
    silent_rewards_are_expected,
)
from .policy_losses import behaviour_log_probs, policy_loss, policy_loss_metrics, reward_advantages

_CONTEXT = "context/"  # prefix of a context's tensors among the rollouts of TRL's buffer


class OneRecGRPOTrainer(OneRecTrainer, GRPOTrainer):
    r"""
    GRPO, ECPO or GBPO on groups that the policy generates, on logged exposures, or on both, beside a supervised loss.

    Every user's candidates share one pass over the context, in the rollouts and in the loss: the buffer holds groups,
    so TRL shuffles users, not candidates. Contexts, reward columns and targets are looked up once per user.

    Args:
        model: A OneRec model with a catalogue, a PEFT model around one, or the folder or repository of either.
        reward_funcs: TRL's reward functions, as in `onerec_hf.rewards`; `prompts` are the numbers of the rows. `None`
            for a candidate: no reward of this function; where no function has one, the advantage is 0 and the
            candidate has no part in the group's mean. NaN and infinite rewards are refused. Beside the columns of the
            rows they get `item_ids` ([`~rewards.spelled_items`]), and `num_generations`, for each candidate the G of
            this call, which `num_generations_eval` may say otherwise. May be left out with `logged_weight=1`.
        args ([`OneRecGRPOConfig`], *optional*): As in SFT.
        train_dataset, eval_dataset (`datasets.Dataset`): One row per user, whatever `data_collator.context` and the
            reward functions read; with a column `targets` (item indices) the share of groups that hold a target is
            logged.
        data_collator (*optional*): As in SFT: `data_collator.context(rows)` gives the context, `data_collator(rows)`
            also `target_ids`.
        logged_dataset (`datasets.Dataset`, *optional*): Logged exposures, one row per context: `targets` (n items),
            `advantage` (n numbers, used as they are by every loss; 0 is left out) and, where the policy that showed
            them is known, `log_probs` (n lists of L log-probabilities within the level at exposure; NaN or an absent
            column: pi_old = sg(pi)). [`feedback_exposures`] makes them.
        sft_dataset (`datasets.Dataset`, *optional*): Rows of the supervised loss, as `data_collator` takes them.
        processing_class, callbacks, optimizers, peft_config, ...: As TRL's.

    The losses of logged exposures and of supervised rows are means over the exposures and the targets of the whole
    optimizer step, in all processes. Logged beside TRL's numbers are means over what was counted since the last log:
    `loss/on_policy` (of a candidate), `loss/logged` (of an exposure whose advantage is not 0), `loss/sft` (of a
    target); `legality`; `hit_rate` (groups with a true target); `zero_advantage`; `entropy/level_<l>` in nats; `kl`
    and the shares of [`policy_loss_metrics`] (of a code; on-policy ones where there are any, else logged ones). Means
    over micro-batches: its largest weights; `grad_norm/positive` and `grad_norm/negative`, see `sign_norm_steps`;
    `rollout_seconds`.
    """

    args: OneRecGRPOConfig
    _tag_names = ["onerec", "rl"]
    _card_method = "Reinforcement learning on rollouts of the policy and on logged exposures (`OneRecGRPOTrainer`)."
    _card_settings = ("loss_type", "rollout", "num_generations", "rl_weight", "logged_weight", "sft_weight", "beta")
    _card_papers = ("grpo",)
    loss_is_scaled_for_ga = False  # `Trainer` divides by the accumulation steps

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: OneRecGRPOConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        processing_class: Any = None,
        *,
        data_collator: Callable | None = None,
        logged_dataset: datasets.Dataset | None = None,
        sft_dataset: datasets.Dataset | None = None,
        **kwargs,
    ):
        model, args, data_collator, processing_class = complete(
            OneRecGRPOConfig,
            "GRPO",
            model,
            args,
            data_collator,
            processing_class,
            kwargs.pop("quantization_config", None),
        )
        check_reference(model, args, kwargs.get("peft_config"))
        for name, weight, rows in (
            ("logged_dataset", args.logged_weight, logged_dataset),
            ("sft_dataset", args.sft_weight, sft_dataset),
        ):
            if (weight > 0) != (rows is not None):
                raise ValueError(f"{name} is {'' if rows is not None else 'not '}given, but its weight is {weight}.")
            if rows is not None and not len(rows):
                raise ValueError(f"{name} has no rows, but its weight is {weight}: give rows, or a weight of 0.")
        if args.logged_weight == 1:
            train_dataset, reward_funcs = logged_dataset, reward_funcs or [no_reward]
        if reward_funcs is not None:
            functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            reward_funcs = [finite_or_none(function) for function in functions]
        self.collator: Any = data_collator
        self.context: dict[str, torch.Tensor] = {}
        self.rows = {"train": train_dataset, "eval": eval_dataset}
        for given in self.rows.values():
            check_columns(() if given is None else given.column_names)
        prompts = {name: None if rows is None else places(rows) for name, rows in self.rows.items()}
        super().__init__(
            model,
            reward_funcs,
            args,
            prompts["train"],
            prompts["eval"],
            processing_class,
            rollout_func=rollout,
            **kwargs,
        )
        check_policy(self.policy, args, self.reward_func_names)
        place = (args.seed, self.accelerator.process_index, self.accelerator.num_processes)
        self.logged = logged_dataset and EndlessBatches(logged_dataset, args.logged_batch_size, *place)
        self.supervised = sft_dataset and EndlessBatches(sft_dataset, args.sft_batch_size, *place)
        self._beside: dict[int, tuple] = {}  # what the micro-batches of an optimizer step train on beside rollouts

    @property
    def group_size(self) -> int:
        """G of the current mode."""
        return self.num_generations if self.model.training else self.num_generations_eval

    # ---- resuming

    def _progress(self, folder):
        save_rollouts(self, folder)
        return super()._progress(folder) | {"metrics": self._metrics["train"]}

    def _restore_progress(self, progress, folder):
        super()._restore_progress(progress, folder)
        load_rollouts(self, folder)
        self._metrics["train"].update(progress["metrics"])

    # ---- rollouts

    def _generate_and_score_completions(self, inputs):
        """As TRL's, which sees row numbers for prompts; one entry per group comes back, with the group's context."""
        if self.model.training and self.args.logged_weight == 1:
            return {"none": torch.zeros(self.args.steps_per_generation)}
        group = self.group_size
        if len(inputs) % group:
            raise ValueError(f"a process got {len(inputs)} candidates, no whole groups of {group}.")
        rows = self.rows["train" if self.model.training else "eval"]
        users = [dict(rows[row["prompt"]]) for row in inputs[::group]]
        self.context = self._on_device(self.collator.context(users))
        own = {"num_generations": group}
        inputs = [user | row | own for user, repeats in zip(users, chunks(inputs, group)) for row in repeats]
        found = super()._generate_and_score_completions(inputs)
        for name in [name for name in self._metrics["eval"] if "reward" in name]:
            del self._metrics["eval"][name]  # see `record_rewards`
        found["advantages"] = self._advantages  # TRL's are normalised in another way
        found["rows"] = torch.cat([found["prompt_ids"], found["completion_ids"]], dim=1)
        kept = ("rows", "tool_mask", "advantages", "old_per_token_logps", "ref_per_token_logps")
        groups = {name: found[name].unflatten(0, (-1, group)) for name in kept if name in found}
        return groups | {_CONTEXT + name: tensor for name, tensor in self.context.items()}

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self._prepare_input(tensor) for name, tensor in batch.items()}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        spelled = spelled_items(completion_ids_list, self.policy.catalogue)
        inputs = [row | {ITEM_IDS: ids} for row, ids in zip(inputs, spelled)]
        with silent_rewards_are_expected():
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        raw = [name in self.args.unnormalized_rewards for name in self.reward_func_names]
        weighted = rewards * self.reward_weights.to(rewards.device)
        advantages = reward_advantages(weighted, self.group_size, torch.tensor(raw, device=rewards.device))
        first = self.accelerator.process_index * len(prompts)
        self._advantages = advantages[first : first + len(prompts)]
        if counted := self._rows_counted(len(prompts)):
            own = slice(first, first + counted)
            ids, users = completion_ids_list[:counted], inputs[:counted]
            found = rollout_metrics(ids, users, self.policy.catalogue, self.group_size)
            self.record(found | {"zero_advantage": (advantages[own] == 0).float().mean()}, counted)
            if not self.model.training:
                record_rewards(self, rewards[own], weighted[own])
        return rewards

    def _rows_counted(self, num_rows: int) -> int:
        """See [`rows_counted_here`]; all of a training step."""
        if self.model.training:
            return num_rows
        return rows_counted_here(self, num_rows, len(self.rows["eval"] or ()) * self.group_size)

    def record(self, means: Mapping[str, float | torch.Tensor], count: float | torch.Tensor = 1.0) -> None:
        """As `OneRecTrainer.record`, without rows of an evaluation that another process counts as well."""
        if self._rows_counted(1):  # else another process records the same rows
            super().record(means, count)

    # ---- log-probabilities

    def completion_log_probs(
        self, model: Any, context: dict[str, torch.Tensor], rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Log-probabilities within the level, of the policy, the old policy and the reference alike.

        Args:
            rows (`torch.LongTensor` of shape (R, 1 + C)): BOS and completion; the rows of a context are adjacent.

        Returns:
            (R, C) in nats, 0 on BOS, and the hidden states (R, C, D) before each token.
        """
        found = model(input_ids=rows[:, :-1], labels=rows, logits_to_keep=1, output_hidden_states=True, **context)
        log_probs = F.pad(found.target_log_probs, (1, 0)).flatten(1)[:, 1:]  # BOS in front of each item but the first
        return log_probs, found.hidden_states[-1]

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, batch_size=None, **kwargs):
        """What TRL asks for after rollouts: the old policy's and the reference's numbers, whole groups at a time."""
        users = max(1, (batch_size or len(input_ids)) // self.group_size)
        found = []
        for start in range(0, len(input_ids) // self.group_size, users):
            context = {name: tensor[start : start + users] for name, tensor in self.context.items()}
            part = input_ids[start * self.group_size : (start + users) * self.group_size]
            found.append(self.completion_log_probs(model, context, part)[0])
        return torch.cat(found), None, None

    @torch.no_grad()
    def _entropies(self, hidden, rows) -> dict[str, torch.Tensor]:
        """Entropy of each level in nats, mean over the rows' items."""
        policy, size = self.policy, self.policy.config.num_levels + 1
        hidden = F.pad(hidden.detach(), (0, 0, 0, 1)).unflatten(1, (-1, size)).flatten(0, 1)
        levels = policy.level_distributions(hidden[:, : size - 1], rows.view(-1, size)[:, 1:])
        entropy = [torch.special.entr(log_probs.exp()).sum(1).mean() for log_probs in levels]
        return {f"entropy/level_{level + 1}": value for level, value in enumerate(entropy)}

    # ---- loss

    def _look_ahead(self) -> None:
        """Takes what the micro-batches of the step that begins train on beside rollouts, and counts it in all
        processes.
        """
        steps = range(self._step, self._step + self.current_gradient_accumulation_steps)
        self._beside = {step: (self._logged_batch(step), self._supervised_batch(step)) for step in steps}
        exposures, targets = torch.tensor(0), torch.tensor(0)
        for logged, supervised in self._beside.values():
            exposures += 0 if logged is None else (logged[1] != 0).sum()
            targets += 0 if supervised is None else self.loss_items(supervised)
        # `Trainer` divides by the micro-batches, and DDP averages over the processes
        shares = len(steps) * self.gradient_shares
        self._exposures_per_share = self.of_all_processes(exposures, self.args.device) / shares
        self._targets_per_share = self.of_all_processes(targets, self.args.device) / shares

    def _logged_batch(self, step: int) -> tuple | None:
        """A collated batch of logged exposures, their advantages and logged log-probabilities."""
        if self.logged is None:
            return None
        rows = self.logged(step)
        batch = self.collator(rows)
        return batch, *pad_logged(rows, tuple(batch["target_ids"].shape))

    def _supervised_batch(self, step: int) -> dict[str, torch.Tensor] | None:
        return None if self.supervised is None else self.collator(self.supervised(step))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the losses, see [`OneRecGRPOConfig`]."""
        args, training = self.args, self.model.training
        if training and (self.logged or self.supervised) and self._step not in self._beside:
            self._look_ahead()
        logged, supervised = self._beside.get(self._step, (None, None)) if training else (None, None)
        logged_weight = args.logged_weight if training else 0.0
        parts = []
        if logged_weight < 1:
            parts.append((1 - logged_weight, *self._on_policy_loss(model, inputs)))
        if logged is not None:
            parts.append((logged_weight, *self._logged_loss(model, not parts, *logged)))
        loss = sum(weight * (per_sample.sum() / count) for weight, per_sample, _, count in parts)
        if training and args.sign_norm_steps and self._step % args.sign_norm_steps == 0:
            self.record(self._norms_by_sign(parts))
        loss = args.rl_weight * loss
        if supervised is not None:
            batch = self._on_device(supervised)
            found = model(**batch, num_items_in_batch=self._targets_per_share).loss
            own = self.loss_items(batch)
            self.record({"loss/sft": found.detach() * self._targets_per_share / own}, own)
            loss = loss + args.sft_weight * found
        return (loss, None) if return_outputs else loss

    def _on_policy_loss(self, model, inputs):
        """Loss (R,) and advantage (R,) of the candidates, and what the sum of the losses is divided by."""
        counted = self._rows_counted(inputs["rows"].flatten(0, 1).shape[0])
        inputs = {name: tensor[: max(1, counted // self.group_size)] for name, tensor in inputs.items()}
        context = {n.removeprefix(_CONTEXT): tensor for n, tensor in inputs.items() if n.startswith(_CONTEXT)}
        rows = inputs["rows"].flatten(0, 1)
        mask, advantages = inputs["tool_mask"].flatten(0, 1), inputs["advantages"].flatten()
        log_probs, hidden = self.completion_log_probs(model, context, rows)
        old = inputs.get("old_per_token_logps")
        old = log_probs.detach() if old is None else old.flatten(0, 1)
        per_code = self._policy_loss(self.args.loss_type, log_probs, old, advantages.unsqueeze(1), mask)
        if self.beta:
            gap = inputs["ref_per_token_logps"].flatten(0, 1) - log_probs
            kl = gap.exp() - gap - 1
            self.record({"kl": (kl.detach() * mask).sum() / mask.sum()}, mask.sum())
            per_code = per_code + self.beta * kl
        per_sample = (per_code * mask).sum(1) / mask.sum(1)
        self.record({"loss/on_policy": per_sample.detach().mean()} | self._entropies(hidden, rows), len(rows))
        return per_sample, advantages, len(rows)

    def _logged_loss(self, model, with_metrics, batch, advantages, logged):
        """As `_on_policy_loss`, of logged exposures; those with an advantage of 0 are filtered out (OneRec-V2)."""
        log_probs = model(**self._on_device(batch)).target_log_probs  # (B, n, L)
        advantages, logged = (tensor.to(log_probs.device) for tensor in (advantages, logged))
        old = behaviour_log_probs(log_probs, logged)
        kept = advantages != 0
        loss_type = self.args.logged_loss_type or self.args.loss_type
        mask = kept.unsqueeze(2).expand(log_probs.shape)
        per_code = self._policy_loss(loss_type, log_probs, old, advantages.unsqueeze(2), mask, with_metrics)
        per_sample = torch.where(kept, per_code.mean(2), 0.0).flatten()  # (B * n,)
        self.record({"loss/logged": per_sample.detach().sum() / kept.sum()}, kept.sum())
        return per_sample, advantages.flatten(), self._exposures_per_share

    def _policy_loss(self, loss_type, log_probs, old, advantages, mask, with_metrics=True):
        """Loss of each code, shape of `log_probs`; `advantages` broadcast to it, `mask` says which codes the log
        counts.
        """
        settings: dict[str, Any] = {
            "loss_type": loss_type,
            "epsilon": self.args.epsilon,
            "delta": self.args.delta,
        }
        if with_metrics:
            found = policy_loss_metrics(log_probs, old, advantages, mask, **settings)
            self.record({name: found.pop(name) for name in list(found) if name.startswith("weight/")})
            self.record(found, (mask.bool() & (advantages != 0)).sum())
        return policy_loss(log_probs, old, advantages, **settings)

    def _norms_by_sign(self, parts) -> dict[str, torch.Tensor]:
        """
        Gradient norm of the policy loss of positive and of negative advantages alone, over all trained parameters.

        Exact for this process's micro-batch, before clipping and without `rl_weight`; the log has the mean over
        processes.
        """
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        norms = {}
        for name, sign in (("positive", 1), ("negative", -1)):
            loss = sum(weight * ((a.sign() == sign) * x).sum() / count for weight, x, a, count in parts)
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            norms[f"grad_norm/{name}"] = get_total_norm([grad for grad in grads if grad is not None])
        return norms


__all__ = ["OneRecGRPOTrainer"]
