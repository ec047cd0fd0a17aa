"""The state of an optimizer beside a model, by the names of its weights: for training that goes on with other rows.

A checkpoint's state is numbered by the order of the weights and comes with a learning rate schedule; it is for the
same run. This one is for the next run, whose model may have grown.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

OPTIMIZER_NAME = "optimizer.safetensors"
_SEPARATOR = "::"


class KeepOptimizer(TrainerCallback):
    r"""
    Writes the optimizer's state into the output folder at the end, and starts from an earlier one.

    Args:
        trainer: Whose callback this is; one whose processes all hold the whole weights.
        folder (`str`, *optional*): Of the run before. Its state is taken over for the weights whose name and shape are
            the same; the others start without. A run that resumes from a checkpoint has the checkpoint's.

    Raises:
        FileNotFoundError: Where the folder has no such state. ValueError: Under FSDP and DeepSpeed.
    """

    def __init__(self, trainer: Trainer, folder: str | Path | None = None):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "keep_optimizer is for processes that hold whole weights, not for FSDP or DeepSpeed: leave it out."
            )
        self.trainer, self.before = trainer, None
        if folder is not None:
            path = Path(folder) / OPTIMIZER_NAME
            if not path.is_file():
                raise FileNotFoundError(
                    f"{folder} has no {OPTIMIZER_NAME}, the state of the optimizer: train it with --keep_optimizer "
                    "true, too, or leave that out here. The Hub never has it."
                )
            self.before = load_file(path)

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before is None or state.global_step:
            return
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in self.before.items():
            name, _, kind = key.partition(_SEPARATOR)
            found.setdefault(name, {})[kind] = value
        for name, weight in self._weights().items():
            own = found.get(name, {})
            if own and all(value.dim() == 0 or value.shape == weight.shape for value in own.values()):
                self.trainer.optimizer.state[weight] = {
                    kind: value.to(weight.device) if value.dim() else value for kind, value in own.items()
                }

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        held, tensors = self.trainer.optimizer.state, {}
        for name, weight in self._weights().items():
            for kind, value in held.get(weight, {}).items():
                tensors[f"{name}{_SEPARATOR}{kind}"] = torch.as_tensor(value).detach().cpu().contiguous()
        partial = Path(args.output_dir) / f"{OPTIMIZER_NAME}.partial"
        save_file(tensors, partial)
        partial.replace(Path(args.output_dir) / OPTIMIZER_NAME)


__all__ = ["OPTIMIZER_NAME", "KeepOptimizer"]
