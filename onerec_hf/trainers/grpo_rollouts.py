"""Rollouts of reinforcement learning: groups of candidates from the policy, and their place in a checkpoint.

OneRec Technical Report, RL (arXiv:2506.13695): beam search on the current policy did best. Legend: B users, G candidates of a user,
R = B * G rows, C tokens of a completion.
"""

import os
import time
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl.models import unwrap_model_for_generation

from ..models import Catalogue
from ..rewards import completion_leaves


def rollout(prompts: list[int], trainer: Any) -> dict[str, list]:
    """TRL's `rollout_func`: G candidates of each user of `trainer.context`, adjacent rows, from the current policy."""
    start, group = time.perf_counter(), trainer.group_size
    how = trainer.args.rollout
    settings = {"num_beams": group}
    if how != "beam":
        settings = {"do_sample": True, "temperature": trainer.temperature, "top_k": 0, "num_beams": 1}
        settings |= {"replacement": False} if how == "tree" else {}
        settings |= {"constrained": False} if how == "unconstrained" else {}
    with torch.no_grad(), unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator):
        policy = trainer.policy
        was_training = policy.training
        policy.eval()
        rows = policy.generate(**trainer.context, **settings, num_return_sequences=group)  # (R, 1 + C)
        policy.train(was_training)
    if bool((rows[:, 1] == policy.config.pad_token_id).any()):
        raise ValueError(f"some users have fewer than num_generations={group} different items: lower it.")
    completion = rows[:, 1:]
    is_code = completion >= policy.config.level_offsets[0]
    result = {"prompt_ids": rows[:, :1].tolist(), "completion_ids": completion.tolist(), "logprobs": None}
    result["env_mask"] = is_code.long().tolist()  # BOS between the items of a session is nobody's choice
    if any(getattr(function, "needs_sample_log_probs", False) for function in trainer.reward_funcs):
        with torch.no_grad():
            result["sample_log_probs"] = trainer.row_log_probs(policy, trainer.context, rows)[0].sum(1).tolist()
    trainer.record({"rollout_seconds": time.perf_counter() - start})
    return result


def rollout_metrics(
    completion_ids: list[list[int]], rows: list[dict], catalogue: Catalogue, group_size: int
) -> dict[str, float]:
    """`legality` of candidates, a row each, and where the rows have `targets`, `hit_rate`: groups in which one is a true target."""
    leaves, owner = completion_leaves(completion_ids, catalogue)
    metrics = {"legality": 1 - len(owner[leaves < 0].unique()) / len(rows)}
    if "targets" in rows[0]:
        hits = 0
        for place, row in enumerate(rows[::group_size]):
            wanted = catalogue.leaves_of(catalogue.semantic_ids[torch.as_tensor(row["targets"]).long()].long())
            hits += bool(torch.isin(leaves[owner // group_size == place], wanted.cpu()).any())
        metrics["hit_rate"] = hits * group_size / len(rows)
    return metrics


class RolloutCheckpoint(TrainerCallback):
    """
    Writes the rollouts that are still to be trained on into every checkpoint, and reads them back.

    Without them a run that stops between two generations would go on with new rollouts of a newer policy: other numbers than
    those of the unbroken run.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs) -> None:
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
        path = os.path.join(str(checkpoint), self._name)
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


__all__ = ["RolloutCheckpoint", "rollout", "rollout_metrics"]
