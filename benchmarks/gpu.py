"""The presets on a GPU: latency of generation, and time and MFU of training per target, against other models and
searches.

    python benchmarks/gpu.py --output outputs/gpu.json
    python benchmarks/gpu.py --parts train --names "lazy decoder-only" --requests 256 128 \\
        --output outputs/gpu_lazy.json

`generate`: one preset in bf16, a catalogue of a million items (3 x 8192), a context of 3000. `unconstrained`, `dict
trie` and `processor` are transformers' own loop as in generate.py; `ours` is `model.generate`; `ours, graph` is the
same work (context included) captured once as a CUDA graph and replayed; `ours, compiled` is
`model.generate(compile_config=...)`, which makes its own graphs. `selection` is the search alone on ready
log-probabilities, as a graph: constraint, top-k and the bookkeeping of beams. Every constrained way must return our
scores first, in float32. `floor`: per step, the larger of the time of the matrix products at the speed of a large one
and of the time to read the weights at the speed of a large copy, both measured here.

`train`: forward, backward and a fused AdamW step, in bf16 under autocast (weights float32), of the contestants of
architectures.py at the size 1B. MFU: counted FLOPs (every matrix product, nothing recomputed) over the time and the
speed of a large product measured here. Medians of wall-clock times between synchronisations; the ways of `generate`
alternate, the contestants of `train` run one after the other.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import architectures
import torch
from generate import ways_of
from other_ways import count_flops, dict_trie, zipf_catalogue
from selection import Given
from transformers import CompileConfig

from onerec_hf import Catalogue, OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.models.beam_search import BeamSearch, beam_search, search
from onerec_hf.models.captured_search import record


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def clock(ways: dict, repeats: int, device: str) -> dict[str, float]:
    """Median wall-clock milliseconds of each way, alternating, after one run of each."""
    seconds = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            synchronize(device)
            start = time.perf_counter()
            way()
            synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(values) for name, values in seconds.items()}


def ceilings(device: str) -> dict[str, float]:
    """FLOP/s of a large bf16 product and bytes/s of a large copy, read and written."""
    size, length = (8192, 2**30) if device != "cpu" else (256, 2**20)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(256, (length,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    took = clock({"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, 10, device)
    return {"flops": 2 * size**3 / took["product"] * 1e3, "bytes": 2 * length / took["copy"] * 1e3}


def captured(way):
    """`way` as a CUDA graph: a function that replays it; what `way` returned is filled anew each time."""
    replay, result = record(way)

    def again():
        replay()
        return result

    return again


def selection_alone(catalogue, batch: int, beams: int, device: str):
    """The search without a model: flat log-probabilities that are ready."""
    ready = [torch.randn(batch * beams, size, device=device).log_softmax(-1) for size in catalogue.codebook_sizes]

    def score(level, codes):
        return ready[level][: codes.shape[0] * codes.shape[1]]

    return lambda: search(Given(score, batch, device), BeamSearch(), catalogue, batch, beams)


def generation(model, catalogue, trie, batch: int, beams: int, args, speed: dict) -> dict:
    device = args.device
    ways = ways_of(model, catalogue, trie, batch, args.context, beams)
    ours, levels = ways["ours"], catalogue.num_levels
    if batch > 1:  # of the other searches' copies of the context there would be thousands
        ways = {"ours": ours}

    @torch.no_grad()
    def whole():
        context_kv = model.encode_context(context_ids=ours.keywords["context_ids"])
        return beam_search(model, catalogue, context_kv, beams)

    model.float()  # in bf16 the roundings of the ways differ, and with them the last beams
    expected = ours()["sequences_scores"]
    for name in ways.keys() - {"unconstrained", "ours"}:
        torch.testing.assert_close(ways[name]()["sequences_scores"], expected, atol=1e-3, rtol=0, msg=name)
    if device != "cpu":
        torch.testing.assert_close(captured(whole)().scores.flatten() / levels, expected, atol=1e-3, rtol=0)
    model.bfloat16()
    alone = {"selection": selection_alone(catalogue, batch, beams, device)}
    if device != "cpu":
        ways["ours, graph"], alone["selection"] = captured(whole), captured(alone["selection"])
    if beams in args.compile:
        start = time.perf_counter()
        config = CompileConfig(fullgraph=True, mode="reduce-overhead")
        ways["ours, compiled"] = partial(ours, compile_config=config)
        ways["ours, compiled"]()
        synchronize(device)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    found, flops = count_flops(whole)
    assert (found.leaves >= 0).all()
    weights = sum(p.numel() * p.element_size() for layer in model.model.decoder.layers for p in layer.parameters())
    read = 1e3 * weights / speed["bytes"]
    product = 1e3 * flops / speed["flops"] / (levels - 1)  # the first step has one row per user
    row = {"batch": batch, "beams": beams, "context": args.context, "tera_flop": flops / 1e12}
    row["milliseconds"] = clock(ways, args.repeats, device) | clock(alone, args.repeats, device)
    return row | {"floor": read + (levels - 1) * max(read, product)}


def generate_part(args, speed) -> list[dict]:
    settings = architectures.settings_of(args.size) | args.config
    sizes = [args.codebook] * 3
    torch.manual_seed(0)
    with torch.device(args.device):
        config = OneRecV2Config(**settings | {"codebook_sizes": sizes, "initializer_range": 0.03})
        model = OneRecV2ForCausalLM(config).to(torch.bfloat16).eval()
    codes = zipf_catalogue(args.items, args.codebook, 3, 0.5)
    catalogue, trie = Catalogue(codes, sizes).to(args.device), dict_trie(codes, config.level_offsets)
    rows = []
    for batch in args.batches:
        for beams in args.beams:
            row = generation(model, catalogue, trie, batch, beams, args, speed)
            took = ", ".join(f"{name} {value:.2f}" for name, value in row["milliseconds"].items())
            print(f"batch {batch}, {beams} beams, ms: {took}; floor {row['floor']:.2f}", flush=True)
            rows.append(row)
    return rows


def trained(name: str, context: int, requests: int, args, speed: dict) -> dict:
    _, counter = architectures.count_flops(name, args.size, context, **args.config)
    flops = counter.get_total_flops() / architectures.TARGETS
    data = architectures.batch(requests, context, args.device)
    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device(args.device):
        model, loss_of = architectures.build(name, args.size, context, "sdpa", **args.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(**data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = clock({"step": step}, args.repeats, args.device)["step"] / 1e3
    targets = requests * architectures.TARGETS
    row = {"name": name, "context": context, "requests": requests, "gflops_per_target": flops / 1e9}
    row |= {"microseconds_per_target": 1e6 * seconds / targets, "mfu": flops * targets / seconds / speed["flops"]}
    return row | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device != "cpu" else None}


def train_part(args, speed) -> list[dict]:
    rows = []
    for context, requests in zip(args.contexts, args.requests):
        for name in args.names:
            rows.append(trained(name, context, requests, args, speed))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["generate", "train"], choices=["generate", "train"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="1B", help="of the preset: recipes/configs/models/onerec_v2_SIZE.yaml")
    parser.add_argument(
        "--config", type=json.loads, default={}, help="JSON on top of the preset, or of all contestants"
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--codebook", type=int, default=8192)
    parser.add_argument("--context", type=int, default=3000, help="of `generate`")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--beams", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--compile", type=int, nargs="*", default=[], help="beams that are compiled too (minutes)")
    parser.add_argument(
        "--names", nargs="+", default=architectures.NAMES, choices=architectures.NAMES, help="of `train`"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 3000], help="of `train`")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 8], help="of `train`, per context")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    speed = ceilings(args.device)
    print(f"torch {torch.__version__}, {speed['flops'] / 1e12:.0f} TFLOP/s, {speed['bytes'] / 1e12:.2f} TB/s")
    report = {"device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu", "speed": speed}
    for part, run in (("generate", generate_part), ("train", train_part)):
        if part in args.parts:
            report[part] = run(args, speed)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
