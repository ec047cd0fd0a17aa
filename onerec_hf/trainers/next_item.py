"""Next-item training, which SFT is and IPA starts from: the model's own loss as a mean over the targets of a whole
step, evaluation by what the model really recommends, and averaged weights.

TRL's trainers around it prepare text and score one vocabulary; what they do with either is left out here, by calling
`Trainer`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .base import OneRecTrainer, rows_counted_here

RAW_WEIGHTS_NAME = "raw_weights.safetensors"

_TEXT = "rows are tokens already, and data_collator makes the batches"
_OWN_LOSS = "the loss is the model's own"
# fields of TRL's and transformers' configs that nothing reads here: they would be accepted and do nothing
NOT_READ = {
    "label_smoothing_factor": _OWN_LOSS,
    "router_aux_loss_coef": "experts are balanced without a loss (router_bias_update_rate of the model's config)",
    "use_liger_kernel": "there are no such kernels for these models",
    "include_for_metrics": "generation_metrics sees the model, not its outputs",
    "batch_eval_metrics": "generation_metrics sees the model, not its outputs",
    "do_predict": "recipes score the test split at their end",
    "remove_unused_columns": "the collator reads the columns of the split itself",
} | dict.fromkeys(
    ("dataset_num_proc", "max_length", "truncation_mode", "padding_free", "pad_to_multiple_of", "pad_token"), _TEXT
)


def refuse_unread(arguments: TrainingArguments, not_read: Mapping[str, str]) -> None:
    """Raises a ValueError for fields that are set and that the trainer does not read; `not_read`: name -> why."""
    defaults = {entry.name: entry for entry in dataclasses.fields(arguments)}
    for name, reason in not_read.items():
        entry = defaults[name]
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if getattr(arguments, name) != default:
            raise ValueError(f"{name}={getattr(arguments, name)!r} would do nothing: {reason}. Leave it out.")


@dataclass
class NextItemArguments:
    """Defaults and fields of next-item training, to be named before a config of TRL among the bases; see
    [`OneRecSFTConfig`].
    """

    remove_unused_columns: bool = field(default=False)
    label_names: list[str] | None = field(default_factory=lambda: ["target_ids"])
    train_sampling_strategy: str = field(default="group_by_length")
    prediction_loss_only: bool = field(default=True)
    hub_strategy: str = field(default="end", metadata={"help": "One commit of the finished model."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run goes on with the patience that its callbacks have left."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "As in transformers."})
    gradient_checkpointing: bool | None = field(  # not False, of which transformers says that the name is old
        default=None, metadata={"help": "Off by default: of three tokens a row it saves little."}
    )
    bf16: bool = field(default=False, metadata={"help": "As in transformers; TRL's default is True."})
    pad_to_multiple_of: int | str | None = field(
        default=None, metadata={"help": "Not read; TRL makes None of 'auto'."}
    )
    weight_average_decay: float | None = field(
        default=None, metadata={"help": "Of the moving average of the weights."}
    )

    def __post_init__(self):
        super().__post_init__()  # type: ignore[misc]  # of the config of TRL
        if not torch.accelerator.is_available():  # torch warns where memory is pinned for no device
            self.dataloader_pin_memory = False
        if self.weight_average_decay is not None and not 0 < self.weight_average_decay < 1:
            raise ValueError(f"weight_average_decay={self.weight_average_decay}: it must lie between 0 and 1.")


def under_fsdp(args: TrainingArguments) -> bool:
    """Whether weights will be sharded: what the arguments or `accelerate launch` say, before there is a process
    group.
    """
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


class NextItemTrainer(OneRecTrainer):
    """To be named before a trainer of TRL among the bases; see [`OneRecSFTTrainer`]."""

    args: Any
    loss_is_scaled_for_ga: Any = None  # by the count of `get_batch_samples`, where there is one

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        generation_metrics: Callable | None = None,
        **kwargs,
    ):
        if args.weight_average_decay is not None and under_fsdp(args):
            raise ValueError(
                "weight_average_decay is for data-parallel training: under FSDP no process has whole weights."
            )
        columns = getattr(kwargs.get("train_dataset"), "column_names", None) or ()
        if args.length_column_name not in columns:
            if args.train_sampling_strategy == "group_by_length":
                args.train_sampling_strategy = "random"
            elif args.train_sampling_strategy == "batch_rebalance":
                raise ValueError(
                    "train_sampling_strategy='batch_rebalance' reads the lengths of histories from the column "
                    f"{args.length_column_name!r}; the training rows have {sorted(columns)}."
                )
        super().__init__(model=model, args=args, **kwargs)
        self.generation_metrics = generation_metrics
        self.model_accepts_loss_kwargs = True  # what `get_batch_samples` counts
        self._eval_loss = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # sum and count
        self._average: dict[str, torch.Tensor] | None = None
        if self.args.weight_average_decay is not None:
            self.add_callback(_UpdateAverage(self))

    # ---- a mean over all targets of a step, whatever they were divided into

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of the next optimizer step, and what their summed losses are divided by, in all processes
        together.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.loss_items(batch) for batch in batches]
        return batches, self.of_all_processes(torch.stack(counts).sum(), device) if counts else None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; TRL's would score rows of `input_ids` over the whole vocabulary."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        inputs, real = self._counted_here(inputs)
        loss, *rest = Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and real:
            count = self.loss_items(inputs).to(loss.device)
            self._eval_loss += torch.stack([loss.double() * count, count.double()])
        return loss, *rest

    def _counted_here(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The rows of a batch that no other process counts, and how many those are. At least one row stays, since all
        processes call the model alike.
        """
        batch = find_batch_size(inputs)
        real = rows_counted_here(self, batch)
        if real == batch:
            return inputs, batch
        rows = {
            name: values[: max(real, 1)] if isinstance(values, torch.Tensor) and values.dim() else values
            for name, values in inputs.items()
        }
        return rows, real

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        As `Trainer`'s, whose loss is a mean of the batches' means; this one is a mean over targets, as in training.

        Of an evaluation, `generation_metrics` are among its metrics, so that callbacks see them, too.
        """
        self._eval_loss.zero_()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, count = self.accelerator.reduce(self._eval_loss, "sum").tolist()
        for name in output.metrics:
            if count and name.endswith("_loss"):
                output.metrics[name] = total / count
        if self.generation_metrics is not None and description == "Evaluation":
            found = self.generation_metrics(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{metric_key_prefix}_{name}": float(value) for name, value in found.items()})
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        with self._averaged_weights():
            return Trainer.evaluate(self, eval_dataset, ignore_keys, metric_key_prefix)

    # ---- the moving average of the weights

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
    def __init__(self, trainer: NextItemTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.update_average(state.global_step)


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, weight in target.items():
        weight.copy_(source[name])


__all__ = ["NOT_READ", "NextItemArguments", "NextItemTrainer", "refuse_unread", "under_fsdp"]
