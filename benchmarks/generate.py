"""Constrained generation: transformers' own loop with several constraints against this package's search, on the same weights.

    python benchmarks/generate.py --items 12000 1000000 --batches 1 16 --beams 10 128 --output outputs/generate.json

A lazy decoder (4 layers, d=256) over 3 x 8192 codes (or 4 x 256: `--codebook 256 --levels 4`) and a context of 128 items. Every
constrained way is first checked to return our scores; then the ways alternate and the median counts. `unconstrained`: transformers'
beam search without a catalogue, the context repeated per beam, as transformers does with tensors. `dict trie`: the same with
`prefix_allowed_tokens_fn`. `processor`: our `CatalogueLogitsProcessor` in transformers' loop, context shared. `ours`: `generate`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import GenerationMixin

from onerec_hf import Catalogue, CatalogueLogitsProcessor, ContextKV, OneRecV2Config, OneRecV2ForCausalLM


def zipf_catalogue(num_items: int, codebook_size: int, levels: int, exponent: float, seed: int = 0) -> np.ndarray:
    """Distinct semantic IDs (num_items, levels) whose codes follow a Zipf law; exponent 0 is uniform."""
    generator = np.random.default_rng(seed)
    weight = np.arange(1, codebook_size + 1) ** -exponent
    found = np.zeros((0, levels), dtype=np.int64)
    while len(found) < num_items:
        more = generator.choice(codebook_size, (num_items, levels), p=weight / weight.sum())
        found = np.unique(np.concatenate([found, more]), axis=0)
    return found[generator.permutation(len(found))[:num_items]]


def dict_trie(codes: np.ndarray, offsets: list[int]) -> dict:
    root: dict = {}
    for row in (codes + np.array(offsets)).tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root


def allowed_tokens(trie: dict):
    """`prefix_allowed_tokens_fn` as public code writes it."""

    def allowed(_, ids):
        node = trie
        for token in ids.tolist()[1:]:
            node = node.get(token)
            if node is None:
                return [0]  # a dead beam must return something
        return list(node)

    return allowed


def repeated(kv: ContextKV, times: int) -> ContextKV:
    """The context once per beam."""
    many = [tuple(t.repeat_interleave(times, 0) for t in states) for states in (kv.key_states, kv.value_states)]
    return ContextKV(key_states=many[0], value_states=many[1], mask=kv.mask.repeat_interleave(times, 0))


def ways_of(model, catalogue, trie, context, beams: int) -> dict:
    """Name -> callable that returns (sequences, mean log-probabilities)."""
    batch = context["context_ids"].shape[0]
    settings = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": model.config.num_levels}
    config = GenerationConfig(**settings, bos_token_id=1, pad_token_id=0, do_sample=False)
    bos = torch.ones(batch, 1, dtype=torch.long)
    own = {"generation_config": config, "return_dict_in_generate": True, "output_scores": True}

    def stock(**kwargs):
        kv = repeated(model.model.encode_context(**context), beams)
        return GenerationMixin.generate(model, bos, context_kv=kv, **own, **kwargs)

    def processor():
        chosen = LogitsProcessorList([CatalogueLogitsProcessor(catalogue, model.config.level_offsets)])
        return GenerationMixin.generate(model, bos, logits_processor=chosen, **context, **own)

    return {
        "unconstrained": stock,
        "dict trie": lambda: stock(prefix_allowed_tokens_fn=allowed_tokens(trie)),
        "processor": processor,
        "ours": lambda: model.generate(**context, **settings, return_dict_in_generate=True),
    }


def measure(model, catalogue, trie, batch: int, beams: int, context_length: int, repeats: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(catalogue.num_items, (batch, context_length), generator=generator)
    context = {"context_ids": catalogue.semantic_ids[rows] + torch.tensor(model.config.level_offsets)}
    ways = ways_of(model, catalogue, trie, context, beams)
    expected = ways["ours"]().sequences_scores
    for name in ("dict trie", "processor"):
        found = ways[name]().sequences_scores
        assert torch.allclose(found, expected, atol=2e-3), f"{name} disagrees by {(found - expected).abs().max()}"
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    times = {name: median(values) for name, values in seconds.items()}
    ratios = {name: times[name] / times["ours"] for name in times}
    return {"items": catalogue.num_items, "batch": batch, "beams": beams, "seconds": times, "times_ours": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[12_000, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 128])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--codebook", type=int, default=8192)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--zipf", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = OneRecV2Config(
        codebook_sizes=[args.codebook] * args.levels,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        context_embed_dim=64,
        initializer_range=0.1,
    )
    model = OneRecV2ForCausalLM(config).eval()
    rows = []
    print(
        "| items | batch | beams | ours, s | "
        + " | ".join(f"{n} / ours" for n in ("unconstrained", "dict trie", "processor"))
        + " |"
    )
    print("|---" * 7 + "|")
    for num_items in args.items:
        codes = zipf_catalogue(num_items, args.codebook, args.levels, args.zipf)
        start = time.perf_counter()
        catalogue = Catalogue(codes, config.codebook_sizes)
        build = time.perf_counter() - start
        trie = dict_trie(codes, config.level_offsets)
        model.catalogue = catalogue
        for batch in args.batches:
            for beams in args.beams:
                row = measure(model, catalogue, trie, batch, beams, args.context, args.repeats) | {
                    "build_seconds": build
                }
                rows.append(row)
                ratios = " | ".join(
                    f"{row['times_ours'][n]:.1f}x" for n in ("unconstrained", "dict trie", "processor")
                )
                print(f"| {num_items:,} | {batch} | {beams} | {row['seconds']['ours']:.3f} | {ratios} |", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"arguments": vars(args) | {"output": str(args.output)}, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
