"""How evenly a mixture of experts is used with and without loss-free balancing, and what that costs in loss.

    python experiments/expert_balance.py --data outputs/beauty --threads 1 --output outputs/expert_balance.json

A small OneRec-V2 (4 blocks of width 64, the last two mixtures of 24 experts of width 32, 2 per token, and a shared
one) on a folder that recipes/prepare.py wrote; the same seed, batches and weights for every rate of DeepSeek-V3's bias
update. Reported per block: the largest load of an expert over the mean load (1 is perfect), averaged over 50 steps,
and the loss on 4,000 validation users.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, set_seed

from onerec_hf import OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.collators import OneRecCollator
from onerec_hf.data import load_splits
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer

WINDOW = 50


def train(data: Path, rate: float, steps: int, batch_size: int, seed: int) -> dict:
    """One run; the loads come from the trainer's log."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    splits = load_splits(data)
    config = OneRecV2Config(
        codebook_sizes=tokenizer.codebook_sizes,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        context_embed_dim=32,
        num_experts=24,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        router_bias_update_rate=rate,
    )
    with TemporaryDirectory() as folder:
        arguments = OneRecSFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=256,
            learning_rate=3e-3,
            warmup_steps=20,
            logging_steps=WINDOW,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
        )
        trainer = OneRecSFTTrainer(
            OneRecV2ForCausalLM(config),
            arguments,
            data_collator=OneRecCollator(tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids), 30),
            train_dataset=splits["train"].filter(lambda n: n > 1, input_columns="length").with_format("numpy"),
            eval_dataset=splits["validation"].select(range(min(4000, len(splits["validation"])))).with_format("numpy"),
            processing_class=tokenizer,
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        logs = [entry for entry in trainer.state.log_history if "expert_load_max" in entry]
        loss = trainer.evaluate()["eval_loss"]
    loads = [{name: load for name, load in entry.items() if name.startswith("expert_load/")} for entry in logs]
    return {"rate": rate, "seed": seed, "steps": steps, "loads": loads, "eval_loss": loss, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.001, 0.01])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = [train(args.data, rate, args.steps, args.batch_size, seed) for seed in args.seeds for rate in args.rates]
    print(f"| rate | seed | largest / mean load per block, first {WINDOW} steps | last {WINDOW} steps | eval loss |")
    print("|---" * 5 + "|")
    for run in runs:
        first, last = (", ".join(f"{load:.2f}" for load in run["loads"][i].values()) for i in (0, -1))
        print(f"| {run['rate']} | {run['seed']} | {first} | {last} | {run['eval_loss']:.4f} |")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"threads": args.threads, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
