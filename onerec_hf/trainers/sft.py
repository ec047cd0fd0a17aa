"""Supervised training of a OneRec model: transformers' `Trainer`, judged by what the model really recommends.

The loss is the model's own (OneRec-V2, L_Gen); this file adds the generation metrics to every evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import Trainer, TrainingArguments

from .balance import ExpertBalanceCallback
from .repository import RepositoryMixin


@dataclass
class OneRecSFTConfig(TrainingArguments):
    r"""
    `TrainingArguments` with the defaults that training from collated histories needs.

    Args:
        remove_unused_columns: Off: the collator reads the columns of the split itself.
        label_names: `target_ids`, so that evaluation has a loss.
        train_sampling_strategy: Batches of users with histories of similar length; reads the column `length` where there is one.
        hub_strategy: `"end"`: one commit of the finished model; the checkpoints before it would be no complete repositories.
        metric_for_best_model: Model choice on validation; any key that `generation_metrics` returns, or `"loss"`.
    """

    remove_unused_columns: bool = field(default=False)
    label_names: list[str] | None = field(default_factory=lambda: ["target_ids"])
    train_sampling_strategy: str = field(default="group_by_length")
    prediction_loss_only: bool = field(default=True)
    hub_strategy: str = field(default="end")


class OneRecSFTTrainer(RepositoryMixin, Trainer):
    r"""
    `transformers.Trainer` whose `evaluate` also generates, and which balances the experts of a mixture.

    Args:
        generation_metrics (`Callable[[PreTrainedModel], dict[str, float]]`, *optional*): Called at every evaluation with the
            unwrapped model; its numbers are logged as `eval_<name>` and can choose the best checkpoint. Under several processes
            each one computes them on all rows it is given.
        kwargs: As `Trainer`.
    """

    _card_method = (
        "Supervised: the negative log-probability of the codes of each target, with transformers' `Trainer`."
    )

    def __init__(self, *args, generation_metrics: Callable | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.generation_metrics = generation_metrics
        self.expert_balance = None
        config = self.accelerator.unwrap_model(self.model).config
        if config.num_experts:
            self.expert_balance = ExpertBalanceCallback(config.router_bias_update_rate)
            self.add_callback(self.expert_balance)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.expert_balance is not None and "loss" in logs:
            logs |= self.expert_balance.logs()
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.generation_metrics is not None and not isinstance(eval_dataset or self.eval_dataset, dict):
            found = self.generation_metrics(self.accelerator.unwrap_model(self.model))
            found = {f"{metric_key_prefix}_{name}": float(value) for name, value in found.items()}
            self.log(found)
            metrics.update(found)
        return metrics
