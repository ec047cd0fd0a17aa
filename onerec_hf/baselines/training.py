"""What the trained baselines share: transformers' `Trainer`, and model choice on validation after every epoch."""

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


def train_baseline(
    baseline: Any,
    rows: Sequence[dict],
    collate: Callable[[list[dict]], dict[str, torch.Tensor]],
    loss: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, int]],
    *,
    validate: Callable | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    num_epochs: int = 40,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    lr_scheduler_type: str = "constant_with_warmup",
    warmup_steps: int = 100,
    weight_average_decay: float | None = None,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    bf16: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Trains `baseline.model` and leaves it in evaluation mode; `baseline.training_log` gets one record per epoch.

    Args:
        baseline: has `model` (a `PreTrainedModel`) and `training_log` (a list).
        rows (sequence of dicts): training samples; `input_ids` gives their length, batches are of similar length.
        collate: rows to a batch of tensors. It draws what is random from torch's global generator, which `Trainer`
            seeds.
        loss: batch to the **sum** of the losses, in nats, and the number of terms in it.
        validate (`Callable[[baseline], float]`, *optional*): called after an epoch; the weights of the epoch with the
            highest value are kept. It must not read the test split. If None, the last epoch is kept.
        validate_every (`int`, defaults to 1): epochs from one validation to the next; the last epoch is always
            validated.
        patience (`int`, *optional*): stop after this many epochs without a better value; None: never.
        num_epochs, batch_size (rows), learning_rate, weight_decay, lr_scheduler_type, warmup_steps, seed: see
            `TrainingArguments`. Progress bars where `progress`.
        weight_average_decay (`float`, *optional*): decay per step of an exponential moving average of the weights, at
            most (1 + t) / (10 + t) in step t; what is validated and kept is then the average. None: the weights.
        optimizer (pair, *optional*): a class and its arguments but for `lr`. None: AdamW with betas .9 and .98.
        bf16 (`bool`, defaults to `False`): autocast of the loss to bfloat16, faster where the machine multiplies in
            it.
    """
    if not rows:
        raise ValueError("fit needs at least one history with two items or more.")
    if patience is not None and validate is None:
        raise ValueError(f"patience={patience} needs `validate`: without it no epoch is better than another.")
    if validate_every < 1:
        raise ValueError(f"validate_every is {validate_every}; it counts epochs: 1 or more.")
    baseline.training_log = []
    callback = _KeepBestEpoch(baseline, validate, validate_every, patience, weight_average_decay)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=num_epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_scheduler_type=lr_scheduler_type,
            warmup_steps=warmup_steps,
            adam_beta2=0.98,
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),  # bfloat16 on a processor has to be asked for
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=not progress,
            seed=seed,
        )
        if optimizer is not None:
            optimizer = (optimizer[0], optimizer[1] | {"lr": learning_rate})
        trainer = _Trainer(
            baseline.model,
            arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[callback],
            optimizer_cls_and_kwargs=optimizer,
        )
        trainer.loss = loss
        trainer.remove_callback(PrinterCallback)  # it prints; what it says is in `training_log`
        trainer.train()
    callback.restore()


class _Trainer(Trainer):
    """`Trainer` whose loss does not go through `model.forward`, which would make logits of every item at every
    position.
    """

    loss: Callable

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # accelerate wraps `forward` alone
            total, count = self.loss(inputs)
        return total / count


class _KeepBestEpoch(TrainerCallback):
    """Validates after every n-th epoch and remembers the weights (or their average) of the best one, in memory."""

    def __init__(self, baseline, validate: Callable | None, every: int, patience: int | None, decay: float | None):
        self.baseline, self.validate, self.every, self.patience = baseline, validate, every, patience
        self.decay, self.best_value, self.best_epoch = decay, -float("inf"), 0
        self.average: dict[str, torch.Tensor] | None = None
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.start = time.perf_counter()

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.baseline.model.state_dict().items()}

    def on_step_end(self, args, state, control, **kwargs):
        if self.decay is None:
            return
        if self.average is None:
            self.average = self._weights()
        keep = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, value in self.baseline.model.state_dict().items():
            if value.is_floating_point():  # a buffer of indices is no weight
                self.average[name].lerp_(value, 1 - keep)

    def on_epoch_end(self, args, state, control, **kwargs):
        model, epoch = self.baseline.model, round(state.epoch)
        record = {"epoch": epoch, "seconds": time.perf_counter() - self.start}
        if self.validate is not None and (epoch % self.every == 0 or epoch == args.num_train_epochs):
            raw = None if self.average is None else self._weights()
            if raw is not None:
                model.load_state_dict(self.average)
            model.eval()
            record["validation"] = self.validate(self.baseline)
            model.train()
            if record["validation"] > self.best_value:
                self.best_value, self.best_epoch, self.best_weights = record["validation"], epoch, self._weights()
            if raw is not None:
                model.load_state_dict(raw)
            control.should_training_stop |= self.patience is not None and epoch - self.best_epoch >= self.patience
        self.baseline.training_log.append(record)
        logger.info(f"{type(self.baseline).__name__}: {record}")

    def restore(self) -> None:
        weights = self.best_weights if self.validate is not None else self.average
        if weights is not None:
            self.baseline.model.load_state_dict(weights)
        self.baseline.model.eval()


def windows(histories: Any, length: int) -> list[list[int]]:
    """Cuts histories into windows of at most `length` items, from the end; neighbours share one item.

    Every step from one item to the next lies in exactly one window. Windows of one item are left out.
    """
    return [
        window
        for history in histories
        for end in range(len(history), 1, 1 - length)
        if len(window := list(history[max(0, end - length) : end])) > 1
    ]


def pad_right(rows: Sequence[Sequence[int] | torch.Tensor], value: int) -> torch.Tensor:
    """Rows of different lengths as one tensor (B, longest)."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)


def pad_next_items(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batch of `input_ids` and `labels`. No mask: a causal model's real positions never see what is on their right."""
    return {
        name: pad_right([row[name] for row in rows], value) for name, value in (("input_ids", 0), ("labels", -100))
    }


def recent_items(examples: dict[str, list], length: int, name: str) -> list[list[int]]:
    """The last `length` items of every history; a ValueError where one is empty."""
    recent = [list(history[-length:]) for history in examples["history"]]
    if empty := [row for row, items in enumerate(recent) if not items]:
        raise ValueError(
            f"{name} needs at least one item in every history; rows {empty[:10]} of the batch have none. "
            "Leave cold users out when splitting (min_history=1)."
        )
    return recent
