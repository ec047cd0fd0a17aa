"""What a training step costs beside what it must cost: MFU, targets per second, memory, and where the time goes.

    python benchmarks/train.py --contexts 128 512 3000 --output outputs/train.json
    python benchmarks/train.py --device cuda --size 1b --contexts 512 3000 --requests 16 4
    python benchmarks/train.py --contexts 512 3000 --requests 1 1 --layers 2 --config '{"hidden_size": 128, ...}'

The contestants have the width of a preset (`--size`) and `--layers` of its blocks:

- `lazy, every item a target`: OneRec-V2 with `causal_targets`, as `onerec sft` trains it;
- `lazy, bias over ages`: the same with `context_position="bias"`, whose mask no fused kernel takes;
- `lazy, one request`: five targets that share one context, as the paper trains;
- `lazy with experts, every item a target`: a mixture with as many active parameters;
- `encoder-decoder 1:1`: OneRec-V1's, five targets of one request, with equally many parameters in its blocks.

MFU = model FLOPs / (seconds * measured peak). Model FLOPs by formula, nothing recomputed: 6 for each active weight of
a product and token, and 12 * width for each key that a query sees (OneRec-V2, appendix; Technical Report, MFU). The
peak is a large matrix product on the same device, timed in turns with the steps. On a CPU, seconds are those of the
process (the machine may be shared); on a GPU, between synchronisations. Each contestant runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
from architectures import CODES, SPECIALS, TARGETS, block_parameters, rounded, settings_of
from torch.profiler import ProfilerActivity, profile

from onerec_hf import OneRecV1Config, OneRecV1ForCausalLM, OneRecV2Config, OneRecV2ForCausalLM

LEVELS = 3
EVERY = "lazy, every item a target"
NAMES = {
    EVERY: {},
    "lazy, bias over ages": {"context_position": "bias"},
    "lazy, one request": {},
    "lazy with experts, every item a target": {"num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 1},
    "encoder-decoder 1:1": {},
}
KINDS = {"products": ("mm", "addmm", "bmm", "_grouped_mm"), "attention": ("attention",)}


def every_item(name: str) -> bool:
    return name.startswith("lazy") and name != "lazy, one request"


def settings_for(name: str, args) -> dict:
    settings = settings_of(args.size) | {"codebook_sizes": [CODES] * LEVELS} | args.config | NAMES[name]
    settings["num_hidden_layers"] = args.layers or settings["num_hidden_layers"]
    if settings.get("num_experts"):  # four of an expert's width are as wide as the dense feed-forward
        settings |= {"moe_intermediate_size": settings["intermediate_size"] // 4, "first_dense_layers": 0}
    return settings


def build(name: str, context: int, args):
    """A contestant in training mode."""
    settings = settings_for(name, args)
    if name != "encoder-decoder 1:1":
        return OneRecV2ForCausalLM(OneRecV2Config(**settings)).train()
    width, layers = settings["hidden_size"], settings["num_hidden_layers"]
    encoders = layers // 2
    # 4 d^2 of attention in an encoder block, 8 d^2 in a decoder block with the keys and values of the context
    products = block_parameters(settings) - (4 * encoders + 8 * (layers - encoders)) * width**2
    settings |= {"intermediate_size": rounded(products / (3 * width * layers)), "gated_mlp": True, "num_experts": 0}
    settings |= {"num_encoder_layers": encoders, "num_hidden_layers": layers - encoders}
    lengths = {"short_term_length": 0, "positive_length": context, "lifelong_length": 0}
    code_width = settings["context_embed_dim"]
    return OneRecV1ForCausalLM(OneRecV1Config(**settings, **lengths, code_embed_dim=code_width)).train()


def inputs_of(name: str, context: int, requests: int, codes: int, device: str) -> dict:
    first = torch.tensor([SPECIALS + level * codes for level in range(LEVELS)], device=device)
    targets = context if every_item(name) else TARGETS
    shapes = {"context_ids": (requests, context, LEVELS), "target_ids": (requests, targets, LEVELS)}
    torch.manual_seed(0)
    found = {key: torch.randint(codes, shape, device=device) + first for key, shape in shapes.items()}
    if every_item(name):
        found["causal_targets"] = True
    return found


def model_flops(name: str, model, context: int, requests: int) -> float:
    """Of forward and backward of one step."""
    config, targets = model.config, context if every_item(name) else TARGETS
    width, layers, keys = config.hidden_size, config.num_hidden_layers, context + 1
    attention = 2 * width * config.num_attention_heads * config.head_dim  # queries and outputs
    own = attention + 2 * width * config.num_key_value_heads * config.head_dim
    dense = 3 * width * config.intermediate_size
    active = dense
    if config.has_experts:
        active = 3 * width * config.moe_intermediate_size * (config.num_experts_per_tok + config.num_shared_experts)
    tokens = targets * LEVELS
    seen = (context + 3) / 2 if every_item(name) else keys  # target i sees the static slot and i items
    flops = 6 * tokens * (layers * (attention + own + active) + config.codebook_sizes[0] * width)
    flops += 12 * width * tokens * layers * (seen + (LEVELS + 1) / 2)
    if name == "encoder-decoder 1:1":
        encoders = config.num_encoder_layers
        flops += keys * encoders * (6 * (4 * width**2 + dense) + 12 * width * keys)
        flops += 6 * keys * layers * 2 * width * config.num_context_key_value_heads * config.head_dim
        flops += 6 * context * LEVELS * config.context_embed_dim * width
    else:
        flops += 6 * context * LEVELS * config.context_embed_dim * model.model.context_processor.item_proj.out_features
    return requests * flops


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def shares(run) -> dict[str, float]:
    """Where the time of a step goes, as shares of all operators."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as found:
        run()
    spent = dict.fromkeys((*KINDS, "rest"), 0.0)
    for event in found.key_averages():
        own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        operator = event.key.removeprefix("aten::")
        kind = next((k for k, parts in KINDS.items() if operator in parts or k in operator), "rest")
        spent[kind] += own
    return {kind: value / sum(spent.values()) for kind, value in spent.items()}


def measure(name: str, context: int, requests: int, args) -> dict:
    torch.set_num_threads(args.threads)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    side = 1536 if args.device == "cpu" else 8192
    left, right = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    torch.manual_seed(0)
    model = build(name, context, args).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = inputs_of(name, context, requests, model.config.codebook_sizes[0], args.device)

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, peak = [], []
    for repeat in range(args.repeats + 1):
        start = clock(args.device)
        step()
        middle = clock(args.device)
        for _ in range(3):
            left @ right
        if repeat:
            seconds.append(middle - start)
            peak.append(6 * side**3 / (clock(args.device) - middle))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB beyond weights and inputs
    if args.device != "cpu":
        memory = torch.cuda.max_memory_allocated() / 2**20
    flops = model_flops(name, model, context, requests)
    row = {"name": name, "context": context, "requests": requests, "parameters": model.num_parameters()}
    targets = requests * (context if every_item(name) else TARGETS)
    row |= {"gflops_per_target": flops / targets / 1e9, "targets_per_second": targets / median(seconds)}
    row |= {"mfu": median(flops / s / p for s, p in zip(seconds, peak)), "peak_gflops": median(peak) / 1e9}
    return row | {"step_mib": memory, "shares": shares(step)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="0.1b", help="preset: onerec_hf/scripts/configs/models/onerec_v2_SIZE.yaml")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON on top of the preset")
    parser.add_argument("--layers", type=int, help="blocks, default those of the preset")
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 3000])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 1, 1], help="histories of a step, per context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    print("| contestant | context | GFLOPs per target | targets/s | MFU | step, MiB | products | attention | rest |")
    print("|---" * 9 + "|")
    for context, requests in zip(args.contexts, args.requests):
        for name in args.names:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                row = alone.submit(measure, name, context, requests, args).result()
            rows.append(row)
            where = " | ".join(f"{share:.0%}" for share in row["shares"].values())
            cells = f"{row['gflops_per_target']:.2f} | {row['targets_per_second']:,.1f} | {row['mfu']:.0%}"
            print(f"| {name} | {context} | {cells} | {row['step_mib']:,.0f} | {where} |", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
