"""Training that stops where its numbers stop being numbers, instead of saving a model of NaN under plausible logs."""

from typing import Any

import torch
from transformers import Trainer


class StopAtNonFinite(Trainer):
    r"""
    To be named before `Trainer` among the bases. Raises a `FloatingPointError` before a loss or a gradient that is NaN or infinite
    reaches the weights; `Trainer` itself logs such a loss as the mean of the earlier ones and goes on. What was saved stays.

    Reads one number per micro-batch back to the host, as `Trainer` does for its `logging_nan_inf_filter`, which this replaces, and
    one per step. Under float16 a scaler skips steps whose gradients overflow; there the loss alone is looked at.
    """

    _micro_batch = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args.logging_nan_inf_filter = False

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._micro_batch += 1
        if not torch.isfinite(loss):
            shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            self._stop(
                f"the loss is {loss.item()} in batch {self._micro_batch} of step {self.state.global_step + 1}, of {shapes}"
            )
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._micro_batch = 0
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if norm is not None and not scaled and not torch.isfinite(torch.as_tensor(norm)):
            self._stop(f"the norm of the gradients is {float(norm)} in step {self.state.global_step + 1}")
        return norm

    def _stop(self, what: str) -> None:
        raise FloatingPointError(
            f"{what}: training stops, and no model of it is saved. Look for NaN or infinite values in the data or the weights it "
            f"started from; else lower learning_rate ({self.args.learning_rate:g}) or max_grad_norm, or train in bf16 or float32. "
            f"Earlier checkpoints, if any, are in {self.args.output_dir}."
        )


__all__ = ["StopAtNonFinite"]
