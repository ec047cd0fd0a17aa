"""Supervised training of a OneRec model: transformers' `Trainer`, judged by what the model really recommends.

The loss is the model's own (OneRec-V2, L_Gen); this file adds the generation metrics to every evaluation, and averaged weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .balance import ExpertBalanceCallback
from .repository import RepositoryMixin

RAW_WEIGHTS_NAME = "raw_weights.safetensors"


# fields of TrainingArguments that nothing reads here: they would be accepted and do nothing
SFT_NOT_READ = {
    "label_smoothing_factor": "the loss is the model's own",
    "use_liger_kernel": "there are no such kernels for these models",
    "include_for_metrics": "generation_metrics sees the model, not its outputs",
    "batch_eval_metrics": "generation_metrics sees the model, not its outputs",
    "do_predict": "recipes score the test split at their end",
    "remove_unused_columns": "the collator reads the columns of the split itself",
}


def refuse_unread(arguments: TrainingArguments, not_read: Mapping[str, str]) -> None:
    """Raises a ValueError for fields that are set and that the trainer does not read; `not_read`: name -> why."""
    defaults = {entry.name: entry for entry in dataclasses.fields(arguments)}
    for name, reason in not_read.items():
        entry = defaults[name]
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if getattr(arguments, name) != default:
            raise ValueError(f"{name}={getattr(arguments, name)!r} would do nothing: {reason}. Leave it out.")


@dataclass
class OneRecSFTConfig(TrainingArguments):
    r"""
    `TrainingArguments` with the defaults that training from collated histories needs.

    Args:
        remove_unused_columns: Off: the collator reads the columns of the split itself.
        label_names: `target_ids`, so that evaluation has a loss.
        train_sampling_strategy: Batches of users with histories of similar length; reads the column `length` where there is one.
            The order of an epoch is a function of the seed: a run that resumes inside it goes on with the same batches.
        hub_strategy: `"end"`: one commit of the finished model; the checkpoints before it would be no complete repositories.
        metric_for_best_model: Model choice on validation; any key that `generation_metrics` returns, or `"loss"`.
        weight_average_decay: Keeps an exponential moving average of the trained weights (Polyak averaging), with this decay per
            step; in step t it is at most (1 + t) / (10 + t). Evaluation, checkpoints and the final model then hold the average;
            training goes on with the raw weights, which lie beside the checkpoint. With a constant learning rate it stands for
            a decaying one, and every checkpoint is a finished model. None: no average. For data-parallel training.
    """

    remove_unused_columns: bool = field(default=False)
    label_names: list[str] | None = field(default_factory=lambda: ["target_ids"])
    train_sampling_strategy: str = field(default="group_by_length")
    prediction_loss_only: bool = field(default=True)
    hub_strategy: str = field(default="end")
    weight_average_decay: float | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        refuse_unread(self, SFT_NOT_READ)
        if self.weight_average_decay is not None and not 0 < self.weight_average_decay < 1:
            raise ValueError(f"weight_average_decay={self.weight_average_decay}: it must lie between 0 and 1.")


class OneRecSFTTrainer(RepositoryMixin):
    r"""
    `transformers.Trainer` whose `evaluate` also generates, and which balances the experts of a mixture.

    Args:
        generation_metrics (`Callable[[PreTrainedModel], dict[str, float]]`, *optional*): Called at every evaluation with the
            unwrapped model; its numbers are logged as `eval_<name>` and can choose the best checkpoint. Under several processes
            each one computes them on all rows it is given.
        kwargs: As `Trainer`.
    """

    args: OneRecSFTConfig
    _card_method = (
        "Supervised: the negative log-probability of the codes of each target, with transformers' `Trainer`."
    )

    def __init__(self, *args, generation_metrics: Callable | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.generation_metrics = generation_metrics
        self.model_accepts_loss_kwargs = True  # what `get_batch_samples` counts
        self._eval_loss = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # sum and count
        config = self.accelerator.unwrap_model(self.model).config
        if config.num_experts:
            self.expert_balance = ExpertBalanceCallback(config.router_bias_update_rate)
            self.add_callback(self.expert_balance)

        self._average: dict[str, torch.Tensor] | None = None
        if self.args.weight_average_decay is not None and self.is_fsdp_enabled:
            raise ValueError(
                "weight_average_decay is for data-parallel training: under FSDP no process has whole weights."
            )
        if self.args.weight_average_decay is not None:
            self.add_callback(_UpdateAverage(self))

    # ---- a mean over all targets of a step, whatever they were divided into ---------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of the next optimizer step, and what their summed losses are divided by, in all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self._loss_items(batch) for batch in batches]
        return batches, self._of_all_processes(torch.stack(counts).sum(), device) if counts else None

    def _of_all_processes(self, count: torch.Tensor, device: torch.device) -> torch.Tensor:
        count = count.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum")
        return count.clamp(min=1)

    def _loss_items(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the loss of a batch is a mean over ([`~models.SemanticIdForCausalLM.loss_items`])."""
        policy = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        if "target_ids" in batch:
            return policy.loss_items(batch["target_ids"] != policy.config.pad_token_id)
        return policy.loss_items(batch["labels"].unflatten(1, (-1, policy.config.num_levels + 1))[..., 1:] != -100)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None:
            count = self._loss_items(inputs).to(loss.device)
            self._eval_loss += torch.stack([loss.double() * count, count.double()])
        return loss, *rest

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """As `Trainer`'s, whose loss is a mean of the batches' means; this one is a mean over targets, as in training."""
        self._eval_loss.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(self._eval_loss, "sum").tolist()
        for name in output.metrics:
            if count and name.endswith("_loss"):
                output.metrics[name] = total / count
        return output

    # ---- evaluation and the moving average ------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.expert_balance is not None and "loss" in logs:
            logs |= self.expert_balance.logs()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        with self._averaged_weights():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if self.generation_metrics is not None and not isinstance(eval_dataset or self.eval_dataset, dict):
                found = self.generation_metrics(self.accelerator.unwrap_model(self.model))
                found = {f"{metric_key_prefix}_{name}": float(value) for name, value in found.items()}
                self.log(found)
                metrics.update(found)
        return metrics

    def train(self, *args, **kwargs) -> TrainOutput:
        result = super().train(*args, **kwargs)
        loaded_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if self._average is not None and not loaded_best:
            _copy(self._average, self._trained())
        self._average = None
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._averaged_weights() as raw:
            super().save_model(output_dir, _internal_call)
        if raw is not None and self.args.should_save:
            save_file(raw, Path(output_dir or self.args.output_dir) / RAW_WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.weight_average_decay is not None:
            self._average = {name: weight.detach().clone() for name, weight in self._trained().items()}
            _copy(load_file(Path(resume_from_checkpoint) / RAW_WEIGHTS_NAME), self._trained())

    def _resume_settings(self):
        return super()._resume_settings() | {"weight_average_decay": self.args.weight_average_decay}

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """One step of the moving average; `step` counts from 1."""
        trained = self._trained()
        if self._average is None:
            self._average = {name: weight.detach().clone() for name, weight in trained.items()}
        keep = min(self.args.weight_average_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(trained.values()), 1 - keep)

    @contextmanager
    def _averaged_weights(self):
        """The model holds the average inside; yields the raw weights, or None where there is no average."""
        if self._average is None:
            yield None
            return
        raw = {name: weight.detach().clone() for name, weight in self._trained().items()}
        _copy(self._average, self._trained())
        try:
            yield raw
        finally:
            _copy(raw, self._trained())


class _UpdateAverage(TrainerCallback):
    def __init__(self, trainer: OneRecSFTTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.update_average(state.global_step)


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, weight in target.items():
        weight.copy_(source[name])
