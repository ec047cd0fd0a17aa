"""What all trainers share: the OneRec model inside its wrappers, balanced experts, and logs that are means over what
is counted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ..models import balance_experts
from .hub_mixin import HubMixin


def rows_counted_here(trainer: Any, num_rows: int, total: int | None = None) -> int:
    """How many of the first rows of an evaluation's batch no other process counts: accelerate fills the last batches
    of several processes up with rows of the first ones.

    Args:
        total (`int`, *optional*): Rows of the evaluation, where the loader repeats those of its data set.
    """
    state, processes = trainer.accelerator.gradient_state, trainer.accelerator.num_processes
    size = trainer.args.eval_batch_size
    remainder = state.remainder if total is None else total % (size * processes)
    if not state.end_of_dataloader or remainder < 1 or processes == 1:
        return num_rows
    return min(max(remainder - trainer.accelerator.process_index * size, 0), num_rows)


class ExpertBalanceCallback(TrainerCallback):
    r"""
    Updates the router biases after every optimizer step, and keeps the loads for the log: loss-free balancing
    (DeepSeek-V3, arXiv:2412.19437; OneRec-V2, section 2.2.2).

    Works under gradient accumulation and DDP: the loads of all micro-batches and of all processes count. Under PEFT
    the biases stay as they are, because an adapter file does not hold them.

    Args:
        rate (`float`): gamma; the model's `config.router_bias_update_rate`.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.since_last_log: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs) -> None:
        rate = 0.0 if hasattr(model, "peft_config") else self.rate
        if violations := balance_experts(model, rate):
            self.since_last_log.append(violations)

    def logs(self) -> dict[str, float]:
        """Mean over the steps since the last call of the largest load over the mean load: the worst block's, and every
        block's.
        """
        steps, self.since_last_log = self.since_last_log, []
        if not steps:
            return {}
        blocks = {name.removeprefix("module."): sum(s[name] for s in steps) / len(steps) for name in steps[0]}
        return {"expert_load_max": max(blocks.values())} | {f"expert_load/{name}": v for name, v in blocks.items()}


class OneRecTrainer(HubMixin):
    """
    What the trainers of supervised training, IPA and RL have in common. Alone it is a `Trainer` for OneRec models,
    with the model's own loss; named before a trainer of TRL among the bases, it adds to that one.

    - The router biases of a mixture of experts are updated after every optimizer step ([`ExpertBalanceCallback`]).
    - What `record` is given is logged as means over all processes.
    - A killed run goes on bit for bit ([`ResumableTrainer`]); a loss or gradient that is NaN or infinite stops it
      ([`StopAtNonFinite`]).
    - The collator is saved with the model, and `push_to_hub` sends a card along.

    With a trainer of TRL, override `compute_loss`, since TRL's losses are over the codes of all levels at once, and
    set `_tag_names` without `"trl"`, which the model refuses.

    Args:
        args, kwargs: Those of the other base. The model is a OneRec model, or a PEFT model around one; the collator
            needs `remove_unused_columns=False`.

    Raises:
        PermissionError: `output_dir` cannot be written.
    """

    expert_balance: ExpertBalanceCallback | None = None

    def __init__(self, *args, **kwargs):
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}  # name -> sum and count
        super().__init__(*args, **kwargs)
        config = self.policy.config
        if config.num_experts:
            self.expert_balance = ExpertBalanceCallback(config.router_bias_update_rate)
            self.add_callback(self.expert_balance)

    @property
    def policy(self) -> Any:
        """The OneRec model itself: no DDP around it, adapters inside."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    # ---- counting

    def loss_items(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the loss of a batch is a mean over ([`~models.SemanticIdForCausalLM.loss_items`])."""
        policy = self.policy
        if "target_ids" in batch:
            return policy.loss_items(batch["target_ids"] != policy.config.pad_token_id)
        return policy.loss_items(batch["labels"].unflatten(1, (-1, policy.config.num_levels + 1))[..., 1:] != -100)

    def of_all_processes(self, count: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """The sum over the processes, at least 1; each process's own with `average_tokens_across_devices=False`."""
        count = count.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum")
        return count.clamp(min=1)

    @property
    def gradient_shares(self) -> int:
        """How many processes DDP averages gradients over, where counts are those of all processes."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    # ---- logs

    def record(self, means: Mapping[str, float | torch.Tensor], count: float | torch.Tensor = 1.0) -> None:
        """
        Adds means over `count` things each to the next log, which has the mean over all things since the last one, in
        all processes.

        A NaN, the mean over nothing, does not count.
        """
        sums = self._sums["train" if self.model.training else "eval"]
        for name, mean in means.items():
            value = torch.as_tensor(mean, dtype=torch.float64, device=self.args.device).detach()
            pair = torch.stack([value, torch.ones_like(value)]) * count
            pair = torch.where(value.isnan(), 0.0, pair)
            sums[name] = sums[name] + pair if name in sums else pair

    def _recorded(self, logs: dict[str, float]) -> dict[str, float]:
        """What a log of the training loss, or of an evaluation, has beside it."""
        mode = "train" if self.model.training else "eval"
        if "loss" not in logs if mode == "train" else not any(name.startswith("eval_") for name in logs):
            return {}
        parts = gather_object([{name: pair.tolist() for name, pair in self._sums[mode].items()}])
        self._sums[mode].clear()
        found = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            total, count = (sum(values) for values in zip(*(part[name] for part in parts if name in part)))
            if count:
                found[name if mode == "train" else f"eval_{name}"] = total / count
        return found

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As `Trainer.log`. With a training loss, or an evaluation, come the means that `record` collected since the
        last one, and with a training loss the loads of the experts ([`ExpertBalanceCallback`]).
        """
        logs |= self._recorded(logs)
        if self.expert_balance is not None and "loss" in logs:
            logs |= self.expert_balance.logs()
        super().log(logs, *args, **kwargs)

    # ---- resuming

    def _progress(self, folder: Path) -> dict[str, Any]:
        sums = {name: pair.tolist() for name, pair in self._sums["train"].items()}
        loads = self.expert_balance.since_last_log if self.expert_balance else []
        return super()._progress(folder) | {"expert_loads": loads, "sums": sums}

    def _restore_progress(self, progress: dict[str, Any], folder: Path) -> None:
        super()._restore_progress(progress, folder)
        pairs = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in progress["sums"].items()}
        self._sums["train"] = {name: pair.to(self.args.device) for name, pair in pairs.items()}
        if self.expert_balance:
            self.expert_balance.since_last_log = progress["expert_loads"]


__all__ = ["ExpertBalanceCallback", "OneRecTrainer", "rows_counted_here"]
