"""Kills runs with SIGKILL at random moments, resumes them, and compares their end with that of a run that nobody
killed.

    python experiments/survival.py --kills 20
    python experiments/survival.py --kills 4 --trainers SFT GRPO --processes 1

Every trainer, on one and on two processes (gloo), on a CPU. Half of the kills wait until a checkpoint begins to be
written and strike within that write. A killed run is resumed from its newest complete checkpoint, may be killed again,
and goes on to the end. Then weights, optimizer state and log history must be equal bit for bit, in every process.
Prints a Markdown table; exits with 1 where anything differs. Runs are forked from this process, so that each takes
seconds.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm
from transformers.utils import logging

from onerec_hf import Catalogue, OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.collators import OneRecCollator
from onerec_hf.rewards import FormatReward
from onerec_hf.trainers import (
    IPAConfig,
    IPATrainer,
    OneRecGRPOConfig,
    OneRecGRPOTrainer,
    OneRecSFTConfig,
    OneRecSFTTrainer,
)
from onerec_hf.trainers.resume import checkpoints_of, why_incomplete

SIZES, ITEMS = [8, 8, 8], 40
TRAINERS = ("SFT", "SFT, averaged weights", "IPA", "GRPO")
# saves fall between two logs and inside epochs, and two of four are deleted
COMMON = {
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "logging_steps": 4,
    "learning_rate": 1e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
GROUP = 4


def noisy_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Draws from torch's and numpy's global generators: what a resumed run must draw again."""
    return [sum(ids) % 7 + float(torch.rand(()) + np.random.rand()) for ids in completion_ids]  # noqa: NPY002


def world() -> tuple[OneRecV2ForCausalLM, OneRecCollator]:
    """A model with experts and dropout, so that random numbers, buffers and loads count."""
    torch.manual_seed(0)
    grid = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    catalogue = Catalogue(grid[torch.randperm(len(grid))[:ITEMS]], SIZES)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_dense_layers": 0}
    model = OneRecV2ForCausalLM(OneRecV2Config(codebook_sizes=SIZES, context_embed_dim=8, dropout=0.1, **shape))
    model.catalogue = catalogue
    token_ids = catalogue.semantic_ids.long() + torch.tensor(model.config.level_offsets)
    return model, OneRecCollator(token_ids.numpy())


def rows_of(count: int, targets: bool = False) -> datasets.Dataset:
    """Users with histories of 2 to 7 items."""
    draw = np.random.default_rng(0)
    rows = [{"user": user, "history": draw.integers(ITEMS, size=2 + user % 6).tolist()} for user in range(count)]
    for row in rows:
        row |= {"length": len(row["history"])} | (
            {"targets": draw.integers(ITEMS, size=2).tolist()} if targets else {}
        )
    return datasets.Dataset.from_list(rows)


def make_trainer(name: str, folder: Path, num_processes: int, **settings: Any) -> Any:
    """24 steps in a few epochs; GRPO stops inside one. `settings` replace the training arguments."""
    model, collator = world()
    rows = rows_of(12 * num_processes)
    common = COMMON | {"per_device_train_batch_size": 2, "num_train_epochs": 4} | settings
    if name.startswith("SFT"):
        decay = 0.9 if name != "SFT" else None
        args = OneRecSFTConfig(str(folder), weight_average_decay=decay, **common)
        return OneRecSFTTrainer(model, args, data_collator=collator, train_dataset=rows)
    if name == "IPA":
        args = IPAConfig(str(folder), dpo_ratio=0.5, num_candidates=8, kl_users=4, disable_dropout=False, **common)
        return IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=noisy_reward)
    common |= {
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_steps": settings.get("max_steps", 23),
    }
    common |= {"rollout": "sample", "steps_per_generation": 2, "num_iterations": 2, "disable_dropout": False}
    args = OneRecGRPOConfig(
        str(folder), logged_weight=0.5, logged_batch_size=3, sft_weight=0.5, sft_batch_size=3, **common
    )
    logged = rows_of(8, targets=True)
    logged = logged.add_column("advantage", [[1.0, -1.0]] * len(logged))
    return OneRecGRPOTrainer(
        model,
        [noisy_reward, FormatReward(model.catalogue, GROUP, 2, seed=1)],
        args,
        rows_of(8 * num_processes, targets=True),
        data_collator=collator,
        logged_dataset=logged,
        sft_dataset=rows_of(8),
    )


def train(name: str, folder: Path, rank: int, num_processes: int, port: int, settings: dict[str, Any]) -> None:
    """What a forked process does: it starts or resumes, and leaves what is compared."""
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    trainer = make_trainer(name, folder, num_processes, **settings)
    trainer.train(resume_from_checkpoint="true" if newest_complete(folder) else None)
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    timed = ("runtime", "per_second", "seconds", "step_time")
    log = [record for record in trainer.state.log_history if "train_loss" not in record]  # of the last process alone
    log = [{key: value for key, value in record.items() if not key.endswith(timed)} for record in log]
    found = {"weights": weights, "optimizer": trainer.optimizer.state_dict(), "log": log}
    trainer.accelerator.wait_for_everyone()
    torch.save(found, folder / f"end-{rank}.pt")


def _take_no_shared_lock(kind: type[tqdm]) -> None:
    """
    Gives the progress bars of this process a lock of its own.

    tqdm's is shared with the parent and all its children. One that is killed while it draws never gives it back; nor
    does the monitor, a thread that a fork leaves behind.
    """
    kind.set_lock(threading.RLock())
    for child in kind.__subclasses__():
        _take_no_shared_lock(child)


def _child(name: str, folder: Path, rank: int, *arguments) -> None:
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _take_no_shared_lock(tqdm)
    status = 1
    try:
        train(name, folder, rank, *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads can wait for each other forever when the groups are taken down


class Run:
    """The processes of one run, forked; all of them die at once, as a machine does."""

    def __init__(self, name: str, folder: Path, num_processes: int, **settings: Any):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        arguments = [(name, folder, rank, num_processes, port, settings) for rank in range(num_processes)]
        self.processes = [fork.Process(target=_child, args=values) for values in arguments]
        for process in self.processes:
            process.start()

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it may end first
                os.kill(process.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        for process in self.processes:
            process.join(timeout=300)
        if self.running:
            self.kill()
            raise RuntimeError("a run did not come to its end")

    @property
    def failed(self) -> bool:
        return any(process.exitcode == 1 for process in self.processes)


def newest_complete(folder: Path) -> Path | None:
    complete = [checkpoint for checkpoint in checkpoints_of(folder) if why_incomplete(checkpoint) is None]
    return complete[-1] if complete else None


def unbroken(name: str, folder: Path, num_processes: int) -> tuple[float, float, float]:
    """Seconds until the first checkpoint appears, until it is complete, and until the end."""
    folder.mkdir(parents=True)
    start, seen = time.perf_counter(), []
    run = Run(name, folder, num_processes)
    while run.running:
        if len(seen) < 2 and (newest_complete(folder) if seen else checkpoints_of(folder)):
            seen.append(time.perf_counter() - start)
        time.sleep(0.0005)
    run.wait()
    if run.failed or len(seen) < 2:
        raise RuntimeError(f"{name} on {num_processes} processes failed: {(folder / 'output-0.txt').read_text()}")
    return seen[0], seen[1], time.perf_counter() - start


def strike(run: Run, folder: Path, moments: tuple[float, float, float], aimed: bool, draw: random.Random) -> bool:
    """Kills the run at a random moment, where `aimed` in the write of a checkpoint; False where it ended before."""
    appears, complete, end = moments
    if aimed:
        known, wanted = {path.name for path in checkpoints_of(folder)}, draw.randint(1, 2)
        while run.running and wanted:  # until another checkpoint appears
            if new := {path.name for path in checkpoints_of(folder)} - known:
                known, wanted = known | new, wanted - 1
            else:
                time.sleep(0.0002)
        time.sleep(draw.uniform(0, complete - appears))
    else:
        moment = time.perf_counter() + draw.uniform(appears / 2, end)
        while run.running and time.perf_counter() < moment:
            time.sleep(0.001)
    if not run.running:
        return False
    run.kill()
    return True


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """Paths of what is not equal bit for bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(expected, found) else [where]
    if isinstance(expected, dict):
        keys = expected.keys() | found.keys()
        return [
            d
            for key in sorted(keys, key=str)
            for d in differences(expected.get(key), found.get(key), f"{where}/{key}")
        ]
    if isinstance(expected, list | tuple) and len(expected) == len(found):
        return [d for i, pair in enumerate(zip(expected, found)) for d in differences(*pair, f"{where}/{i}")]
    return [] if expected == found or (expected != expected and found != found) else [where]


def survive(name: str, num_processes: int, kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kills runs of one trainer `kills` times; what happened."""
    draw, result = random.Random(f"{name}{num_processes}{seed}"), {"kills": 0, "in a write": 0, "different": 0}
    resumed: Counter[int] = Counter()
    moments = unbroken(name, folder / "unbroken", num_processes)
    expected = [torch.load(folder / "unbroken" / f"end-{rank}.pt") for rank in range(num_processes)]
    number = 0
    while result["kills"] < kills:
        number += 1
        broken, done = folder / f"broken-{number}", 0
        broken.mkdir()
        known: set[tuple[Path, int]] = set()
        while True:
            run = Run(name, broken, num_processes)
            left = min(3, kills - result["kills"] + done) - done
            if left and strike(run, broken, moments, result["kills"] % 2 == 1, draw):
                done, result["kills"] = done + 1, result["kills"] + 1
                incomplete = {
                    (path, path.stat().st_mtime_ns) for path in checkpoints_of(broken) if why_incomplete(path)
                }
                result["in a write"] += bool(incomplete - known)  # not those that an earlier kill left
                known = incomplete
                newest = newest_complete(broken)
                resumed[int(newest.name.rpartition("-")[2]) if newest else 0] += 1
                continue
            run.wait()
            break
        found = [broken / f"end-{rank}.pt" for rank in range(num_processes)]
        if run.failed or not all(path.is_file() for path in found):
            result["different"] += 1
            output = (broken / "output-0.txt").read_text()
            print(f"{name} on {num_processes} processes did not come to its end:\n{output}", file=sys.stderr)
        elif different := differences(expected, [torch.load(path) for path in found]):
            result["different"] += 1
            print(f"{name} on {num_processes}: {broken} differs in {different[:5]} ...", file=sys.stderr)
    result["resumed from"] = ", ".join(f"{step or 'the start'} ({n})" for step, n in sorted(resumed.items()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each trainer and number of processes")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    print("| trainer | processes | kills | in a checkpoint write | resumed from step (times) | different |")
    print("|---" * 6 + "|", flush=True)
    different = 0
    for name in args.trainers:
        for count in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                found = survive(name, count, args.kills, Path(folder), args.seed)
            different += found["different"]
            cells = [found["kills"], found["in a write"], found["resumed from"], found["different"]]
            print("| " + " | ".join(map(str, (name, count, *cells))) + " |", flush=True)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
