"""Training of a reward model: its loss as a mean over the known labels of a whole step, on any number of processes."""

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .base import rows_counted_here
from .resume import ResumableTrainer, StopAtNonFinite


class RewardTrainer(StopAtNonFinite, ResumableTrainer):
    r"""
    `Trainer` of [`OneRecSessionRewardModel`] and [`OneRecPScoreModel`], whose killed runs go on and which stops at the
    first NaN.

    A label may be unknown (NaN), so that batches of equally many rows weigh unequally. The loss of an objective is the
    mean over its known labels of the optimizer step, however it is divided into micro-batches and processes; that of
    an evaluation the mean over those of the whole split.

    Args:
        args, kwargs: As `Trainer`'s; `remove_unused_columns=False`, `label_names=["labels"]`, and
            `data_collator` a [`RewardCollator`].
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # what FSDP2 shards as one block; the embedding and the norm inside `items` are sharded by themselves
        self.model._no_split_modules = ["Tower"]
        self.model_accepts_loss_kwargs = True  # what `get_batch_samples` counts
        self._eval_sums: torch.Tensor | None = None  # (2, X): losses and known labels of the evaluation so far

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of the next optimizer step, and the known labels of each objective (X,), in all processes
        together.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        known = torch.stack([_known(batch["labels"]) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            known = self.accelerator.reduce(known, "sum")
        known = known.clamp(min=1)  # of several GPUs in one process (`DataParallel`), a copy for each
        return batches, known.expand(self.args.n_gpu, -1) if self.args.n_gpu > 1 else known

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; of an evaluation, its sums are kept, too."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training and self._eval_sums is not None:
            known = _known(inputs["labels"]).double()
            counted = torch.stack([outputs.loss_sums.view(-1, len(known)).sum(0).double(), known])
            self._eval_sums = self._eval_sums.to(counted.device) + counted
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        labels = inputs["labels"].clone()
        labels[rows_counted_here(self, len(labels)) :] = torch.nan
        return Trainer.prediction_step(self, model, inputs | {"labels": labels}, prediction_loss_only, ignore_keys)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer`'s, whose loss is a mean of the batches' means."""
        config = self.accelerator.unwrap_model(self.model).config
        self._eval_sums = torch.zeros(2, len(config.targets), dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        losses, known = self.accelerator.reduce(self._eval_sums, "sum").cpu()
        self._eval_sums = None
        for name in output.metrics:
            if name.endswith("_loss"):
                weights = torch.tensor(config.target_weights, dtype=torch.float64)
                output.metrics[name] = ((losses / known.clamp(min=1)) @ weights).item()
        return output


def _known(labels: torch.Tensor) -> torch.Tensor:
    """How many labels of each objective are known, (X,)."""
    return (~labels.isnan()).flatten(0, -2).sum(0)


__all__ = ["RewardTrainer"]
