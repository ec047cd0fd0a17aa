"""Training every target of a user in one pass against one sample per target: targets per second, FLOPs, equal losses.

    python benchmarks/multi_target.py --contexts 50 512 --output outputs/multi_target.json

The same model, weights, optimiser and machine. Both ways are checked to give the same loss before anything is timed;
the ways alternate, and the median of the repetitions counts. One sample per target is tried with two batch sizes; the
faster counts.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from onerec_hf import OneRecV2Config, OneRecV2ForCausalLM


def build(hidden_size: int, layers: int, heads: int) -> OneRecV2ForCausalLM:
    torch.manual_seed(0)
    config = OneRecV2Config(
        codebook_sizes=[256] * 3,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        context_embed_dim=hidden_size // 2,
    )
    return OneRecV2ForCausalLM(config).train()


def histories(users: int, length: int) -> torch.Tensor:
    """Random token ids (users, length + 1, 3)."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (users, length + 1, 3), generator=generator)
    return codes + torch.tensor([4, 260, 516])


def together(ids: torch.Tensor) -> list[dict]:
    """One batch: every user's context once, all its targets."""
    return [{"context_ids": ids[:, :-1], "target_ids": ids[:, 1:], "causal_targets": True}]


def one_by_one(ids: torch.Tensor, batch_size: int) -> list[dict]:
    """One target per sample; samples of neighbouring length share a batch, so that next to nothing is lost to
    padding.
    """
    users, count = ids.shape[0], ids.shape[1] - 1
    samples = [(target, user) for target in range(1, count + 1) for user in range(users)]
    batches = []
    for i in range(0, len(samples), batch_size):
        part = samples[i : i + batch_size]
        longest = part[-1][0]
        rows = torch.tensor([user for _, user in part])
        lengths = torch.tensor([target for target, _ in part])
        mask = torch.arange(longest) < lengths.unsqueeze(1)
        context = {"context_ids": ids[rows, :longest] * mask.unsqueeze(2), "context_mask": mask}
        batches.append(context | {"target_ids": ids[rows, lengths].unsqueeze(1)})
    return batches


def run(model, optimizer, batches: list[dict], step: bool = True) -> float:
    """Summed loss over all targets; with `step` also backward and one optimiser step per batch."""
    total = 0.0
    for batch in batches:
        targets = batch["target_ids"].shape[0] * batch["target_ids"].shape[1]
        loss = model(**batch).loss
        total += loss.item() * targets
        if step:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return total


def count_flops(model, batches: list[dict]) -> int:
    """FLOPs of forward and backward; counted with eager attention, whose matrix products the counter sees."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            model(**batch).loss.backward()
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    return counter.get_total_flops()


def measure(model, length: int, users: int, repeats: int) -> dict:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # weights stay, the step costs what a step costs
    ids = histories(users, length)
    ways = {"one pass": together(ids), "one by one, 32": one_by_one(ids, 32), "one by one, 128": one_by_one(ids, 128)}
    with torch.no_grad():
        losses = {
            name: run(model, optimizer, batches, step=False) / (users * length) for name, batches in ways.items()
        }
    assert max(losses.values()) - min(losses.values()) < 1e-5, f"the ways disagree: {losses}"
    flops = {name: count_flops(model, batches) / (users * length) for name, batches in ways.items()}
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, batches in ways.items():
            start = time.perf_counter()
            run(model, optimizer, batches)
            seconds[name].append(time.perf_counter() - start)
    rates = {name: users * length / median(times) for name, times in seconds.items()}
    best = max(list(ways)[1:], key=rates.get)  # the batch size that serves the one-by-one way best
    return {
        "context": length,
        "users": users,
        "targets_per_second": {"one pass": rates["one pass"], "one by one": rates[best]},
        "flops_per_target": {"one pass": flops["one pass"], "one by one": flops[best]},
        "loss_difference": max(losses.values()) - min(losses.values()),
        "speed_ratio": rates["one pass"] / rates[best],
        "flops_ratio": flops[best] / flops["one pass"],
        "one_by_one_batch": best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[50, 512])
    parser.add_argument(
        "--users", type=int, nargs="+", default=[32, 4], help="Users per batch, one number per context."
    )
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args.hidden_size, args.layers, args.heads)
    rows = [measure(model, length, users, args.repeats) for length, users in zip(args.contexts, args.users)]
    print(
        "| context | targets/s: one pass | one by one | measured ratio | GFLOPs/target: one pass | one by one | FLOP "
        "ratio |"
    )
    print("|---" * 7 + "|")
    for row in rows:
        fast, slow = row["targets_per_second"].values()
        few, many = row["flops_per_target"].values()
        print(
            f"| {row['context']} | {fast:,.0f} | {slow:,.0f} | {row['speed_ratio']:.1f}x | {few / 1e9:.4f} | "
            f"{many / 1e9:.4f} | {row['flops_ratio']:.1f}x |"
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
