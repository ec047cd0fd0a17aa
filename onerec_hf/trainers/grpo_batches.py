"""What reinforcement learning draws beside rollouts, and what a resumed run needs: batches by number, rollouts in the checkpoint.

OneRec-V2 (arXiv:2508.20900) trains on logged exposures of which only some have a logged generation probability; the OneRec Technical
Report (arXiv:2506.13695) runs RL beside a supervised loss. Legend: B contexts, n exposures of a context, L levels.
"""

import os

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint


class EndlessBatches:
    """
    Batch k of an endless pass over a data set, reshuffled each time round: a function of k, so a resumed run needs no state.

    Args:
        rows (`datasets.Dataset`): At least one row.
        batch_size (`int`): Rows per call and process.
        seed, process, num_processes (`int`): Each process gets its own share of every round.
    """

    def __init__(
        self, rows: datasets.Dataset, batch_size: int, seed: int = 0, process: int = 0, num_processes: int = 1
    ):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.process, self.num_processes = process, num_processes
        self._round, self._order = -1, None

    def __call__(self, k: int) -> list[dict]:
        first = (k * self.num_processes + self.process) * self.batch_size
        places = []
        for place in range(first, first + self.batch_size):
            number, index = divmod(place, len(self.rows))
            if number != self._round:
                self._round = number
                self._order = np.random.default_rng([self.seed, number]).permutation(len(self.rows))
            places.append(int(self._order[index]))
        batch = self.rows[places]
        return [dict(zip(batch, values)) for values in zip(*batch.values())]


def pad_logged(rows: list[dict], shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages (B, n), 0 where a row has fewer exposures, and logged log-probabilities (B, n, L), NaN where none are known.

    Raises:
        ValueError: Where a row has not one advantage, or not L log-probabilities, per target.
    """
    advantages, logged = torch.zeros(shape[:2]), torch.full(shape, torch.nan)
    for i, row in enumerate(rows):
        count = len(row["targets"])
        if len(row["advantage"]) != count:
            raise ValueError(f"a logged row has {count} targets and {len(row['advantage'])} advantages: one each.")
        advantages[i, :count] = torch.as_tensor(np.asarray(row["advantage"], dtype=np.float32))
        if row.get("log_probs") is not None:
            values = np.asarray([list(item) for item in row["log_probs"]], dtype=np.float32)
            if values.shape != (count, shape[2]):
                raise ValueError(f"log_probs of a logged row is {values.shape}, expected {(count, shape[2])}.")
            logged[i, :count] = torch.as_tensor(values)
    return advantages, logged


class RolloutCheckpoint(TrainerCallback):
    """
    Writes the rollouts that are still to be trained on into every checkpoint, and reads them back.

    Without them a run that stops between two generations would go on with new rollouts of a newer policy: other numbers than those of
    the unbroken run.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        trainer, folder = self.trainer, os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        tensors = {"step": torch.tensor(trainer._step)}
        if trainer._step % (args.steps_per_generation * trainer.num_iterations):  # some are left
            for i, chunk in enumerate(trainer._buffered_inputs):
                tensors |= {f"{i}:{name}": tensor.contiguous().clone() for name, tensor in chunk.items()}
        os.makedirs(folder, exist_ok=True)
        save_file(tensors, os.path.join(folder, self._name))

    @property
    def _name(self) -> str:
        return f"rollouts-{self.trainer.accelerator.process_index}.safetensors"

    def restore(self, checkpoint: str | bool | None) -> None:
        """Reads the rollouts of a checkpoint folder (`True`: the last one of the output folder)."""
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.trainer.args.output_dir)
        if not checkpoint:
            return
        path = os.path.join(checkpoint, self._name)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is absent: the checkpoint is of another trainer or number of processes. Start a new run from its weights."
            )
        tensors = load_file(path, device=str(self.trainer.accelerator.device))
        self.trainer._step = int(tensors.pop("step"))
        chunks: list[dict] = [{} for _ in range(self.trainer.args.steps_per_generation)]
        for name, tensor in tensors.items():
            place, _, name = name.partition(":")
            chunks[int(place)][name] = tensor
        self.trainer._buffered_inputs = chunks if tensors else None


__all__ = ["EndlessBatches", "RolloutCheckpoint", "pad_logged"]
