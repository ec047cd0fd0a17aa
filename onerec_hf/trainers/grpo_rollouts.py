"""What a step of reinforcement learning trains on: rollouts, their place in a checkpoint, and logged exposures by
number.

OneRec Technical Report, RL (arXiv:2506.13695): beam search on the current policy did best, and RL runs beside a
supervised loss; OneRec-V2 (arXiv:2508.20900): only some logged exposures have a logged probability. Legend: B users or
contexts, G candidates of a user, R = B * G rows, C tokens of a completion, n exposures of a context, L levels.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from trl.models import unwrap_model_for_generation

from ..models import Catalogue
from ..rewards import completion_leaves

REFERENCE_NAME = "reference.safetensors"


def rollout(prompts: list[int], trainer: Any) -> dict[str, list]:
    """TRL's `rollout_func`: G candidates of each user of `trainer.context`, adjacent rows, from the current policy."""
    start, group = time.perf_counter(), trainer.group_size
    how = trainer.args.rollout
    settings = {"num_beams": group}
    if not how.endswith("beam"):
        settings = {"do_sample": True, "temperature": trainer.temperature, "num_beams": 1}
        settings |= {"top_k": trainer.args.top_k, "top_p": trainer.args.top_p}
        settings |= {"replacement": False} if how == "tree" else {}
    if how.startswith("unconstrained"):
        settings["constrained"] = False
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
            result["sample_log_probs"] = trainer.completion_log_probs(policy, trainer.context, rows)[0].sum(1).tolist()
    trainer.record({"rollout_seconds": time.perf_counter() - start})
    return result


def rollout_metrics(
    completion_ids: list[list[int]], rows: list[dict], catalogue: Catalogue, group_size: int
) -> dict[str, float]:
    """`legality` of candidates, a row each, and where the rows have `targets`, `hit_rate`: groups in which one is a
    true target.
    """
    leaves, owner = completion_leaves(completion_ids, catalogue)
    metrics = {"legality": 1 - len(owner[leaves < 0].unique()) / len(rows)}
    if "targets" in rows[0]:
        hits = 0
        for place, row in enumerate(rows[::group_size]):
            wanted = catalogue.leaves_of(catalogue.semantic_ids[torch.as_tensor(row["targets"]).long()].long())
            hits += bool(torch.isin(leaves[owner // group_size == place], wanted.cpu()).any())
        metrics["hit_rate"] = hits * group_size / len(rows)
    return metrics


def record_rewards(trainer: Any, rewards: torch.Tensor, weighted: torch.Tensor) -> None:
    """Records the rewards of an evaluation's candidates (R, functions), and their weighted sum: means over candidates,
    where TRL has means of the batches' means, which depend on the number of processes.
    """
    known = weighted[~rewards.isnan().all(1)].nansum(1)
    means = {f"rewards/{name}/mean": own for name, own in zip(trainer.reward_func_names, rewards.T)}
    for name, values in (means | {"reward": known}).items():
        trainer.record({name: values.nanmean()}, (~values.isnan()).sum())


def save_rollouts(trainer: Any, folder: Path) -> None:
    """
    Writes the rollouts of this process that are still to be trained on into a checkpoint.

    Without them a run that stops between two generations would go on with new rollouts of a newer policy: other
    numbers than those of the unbroken run.
    """
    args = trainer.args
    tensors = {"step": torch.tensor(trainer._step)}
    for name, generator in _generators(trainer).items():
        tensors[f"generator:{name}"] = generator.get_state()
    if trainer._step % (args.steps_per_generation * trainer.num_iterations):  # some are left
        for i, chunk in enumerate(trainer._buffered_inputs):
            tensors |= {f"{i}:{name}": tensor.contiguous().clone() for name, tensor in chunk.items()}
    save_file(tensors, folder / _file_name(trainer))
    if args.sync_ref_model and args.should_save:
        save_file(_reference(trainer), folder / REFERENCE_NAME)


def load_rollouts(trainer: Any, folder: Path) -> None:
    """Reads what [`save_rollouts`] wrote."""
    tensors = load_file(folder / _file_name(trainer))
    trainer._step = int(tensors.pop("step"))
    for name, generator in _generators(trainer).items():
        generator.set_state(tensors.pop(f"generator:{name}"))
    chunks: list[dict] = [{} for _ in range(trainer.args.steps_per_generation)]
    for name, tensor in tensors.items():
        place, _, name = name.partition(":")
        chunks[int(place)][name] = tensor.to(
            trainer.accelerator.device
        )  # safetensors reads no "cpu:0", a process's device
    trainer._buffered_inputs = chunks if tensors else None
    if trainer.args.sync_ref_model:
        synced = load_file(folder / REFERENCE_NAME)
        for name, tensor in _reference(trainer).items():
            tensor.copy_(synced[name])


def _file_name(trainer: Any) -> str:
    return f"rollouts-{trainer.accelerator.process_index}.safetensors"


def _generators(trainer: Any) -> dict[str, torch.Generator]:
    """Of the reward functions that draw from one of their own."""
    found = {getattr(f, "__name__", type(f).__name__): getattr(f, "generator", None) for f in trainer.reward_funcs}
    return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}


def _reference(trainer: Any) -> dict[str, torch.Tensor]:
    """The weights of a reference model that follows the policy (`sync_ref_model`)."""
    return {
        name: weight.data for name, weight in trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters()
    }


@contextmanager
def silent_rewards_are_expected() -> Iterator[None]:
    """Without TRL's warning of a completion that no function rewards, which here is one that is no item."""

    def wanted(record: logging.LogRecord) -> bool:
        return "All reward functions returned None" not in str(record.msg)

    logger = logging.getLogger("trl.trainer.grpo_trainer")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def no_reward(completion_ids: Sequence = (), **columns) -> list[None]:
    """Stands where TRL asks for a reward function and nothing is rolled out."""
    return [None] * len(completion_ids)


def places(rows: datasets.Dataset) -> datasets.Dataset:
    """Row numbers for prompts: TRL repeats prompts G times in its loader, and numbers are cheap to repeat."""
    return datasets.Dataset.from_dict({"prompt": range(len(rows))})


def chunks(rows: list, size: int) -> list[list]:
    """`rows` in lists of `size`, in order."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class EndlessBatches:
    """
    Batch k of an endless pass over a data set, reshuffled each time round: a function of k, so a resumed run needs no
    state.

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
        self._round, self._order = -1, np.arange(len(rows))

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
    Advantages (B, n), 0 where a row has fewer exposures, and logged log-probabilities (B, n, L), NaN where none are
    known.

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


__all__ = [
    "EndlessBatches",
    "chunks",
    "load_rollouts",
    "no_reward",
    "pad_logged",
    "places",
    "record_rewards",
    "rollout",
    "rollout_metrics",
    "save_rollouts",
    "silent_rewards_are_expected",
]
