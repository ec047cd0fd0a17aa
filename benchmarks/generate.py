"""Constrained generation end to end: transformers' own loop with several constraints against this package's search.

    python benchmarks/generate.py --output outputs/generate_v2.json
    python benchmarks/generate.py --model t5 --output outputs/generate_t5.json
    python benchmarks/generate.py --model t5 --contexts 512 --batches 1 --beams 128 \\
        --output outputs/generate_t5_512.json

`--model t5` and `--model qwen3` are transformers' own encoder-decoder (4 + 4 layers, d=256) and decoder-only model (4
layers), behind this package's search and `catalogue_generate`; `--model ClassName` is one of this package, with
`--config` (JSON) on top of 4 layers of d=256. Same weights in every way: `unconstrained`, transformers' beam search
without a catalogue; `dict trie`, with `prefix_allowed_tokens_fn`; `processor`, with our `CatalogueLogitsProcessor`;
`ours`, the fast search.

transformers repeats prompt or encoder output per beam, projects it per beam and reorders it in every step. Our models
keep it from that; in their `unconstrained` and `dict trie` the finished keys and values are repeated by hand, which
costs transformers less than a model of its own does, and `processor` shares them. Every constrained way must return
our scores first. Seconds are processor time, medians, the ways alternating. `floor` is our least time of ten runs in a
row over that of our matrix products alone (those of attention included), at the speed of a large one; with
`--compile`, that of the compiled search behind it.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from other_ways import allowed_tokens, alternate, count_flops, dict_trie, machine_flops, read_catalogue, zipf_catalogue
from pictures import bars
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList
from transformers.generation import GenerationMixin
from transformers_models import make_qwen3, make_t5

import onerec_hf
from onerec_hf import Catalogue, CatalogueLogitsProcessor, ContextKV, OneRecV2Config, catalogue_generate
from onerec_hf.baselines.t5_search import T5Beams
from onerec_hf.models.beam_search import BeamSearch, search

BOS = 1
# what `--profile` tells apart
OPERATIONS = (
    "linear",
    "scaled_dot_product_attention",
    "rms_norm",
    "log_softmax",
    "silu",
    "cat",
    "index",
    "gather",
    "topk",
)


def repeated(kv: ContextKV, times: int) -> ContextKV:
    """The context once per beam."""
    many = [tuple(t.repeat_interleave(times, 0) for t in states) for states in (kv.key_states, kv.value_states)]
    return ContextKV(key_states=many[0], value_states=many[1], mask=kv.mask.repeat_interleave(times, 0))


def make_model(name: str, sizes: list[int], overrides: dict):
    torch.manual_seed(0)
    if name in ("t5", "qwen3"):
        return {"t5": make_t5, "qwen3": make_qwen3}[name](sizes, **overrides)
    kind = getattr(onerec_hf, name)
    shape = {"codebook_sizes": sizes, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    if kind.config_class is OneRecV2Config:
        shape["context_embed_dim"] = 64
    return kind(kind.config_class(**(shape | {"initializer_range": 0.1} | overrides))).eval()


def ways_of(model, catalogue, trie, batch: int, context: int, beams: int, compiled: bool = False) -> dict:
    """Name -> callable that returns (sequences, log-probabilities / L)."""
    offsets = OneRecV2Config(codebook_sizes=catalogue.codebook_sizes).level_offsets
    device = model.device
    items = torch.randint(catalogue.num_items, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)
    settings = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": catalogue.num_levels}
    config = GenerationConfig(
        **settings, bos_token_id=BOS, decoder_start_token_id=BOS, pad_token_id=0, do_sample=False
    )
    own = {"generation_config": config, "return_dict_in_generate": True, "output_scores": True}
    if isinstance(model, GenerationMixin) and hasattr(model, "encode_context"):
        inputs = {"context_ids": catalogue.semantic_ids[items] + torch.tensor(offsets, device=device)}
        bos = torch.full((batch, 1), BOS, device=device)

        @torch.no_grad()
        def loop(**kwargs):
            kv = repeated(model.encode_context(**inputs), beams)
            return GenerationMixin.generate(model, bos, context_kv=kv, **own, **kwargs)

        def processor():
            chosen = LogitsProcessorList([CatalogueLogitsProcessor(catalogue, offsets)])
            return GenerationMixin.generate(model, bos, logits_processor=chosen, **inputs, **own)

        ours = partial(
            model.generate,
            **inputs,
            **settings,
            catalogue=catalogue,
            num_session_items=1,
            return_dict_in_generate=True,
        )
        ways = _named(loop, trie, 1, processor, ours)
        if compiled:
            ways["ours, compiled"] = partial(ours, compile_config=CompileConfig(fullgraph=True, mode=None))
        return ways
    ids = catalogue.semantic_ids[items][:, :, 0].long() + offsets[0]  # one token per context position
    prompt = 1 if model.config.is_encoder_decoder else context
    loop = partial(model.generate, ids, **own)

    def processor():
        return loop(logits_processor=LogitsProcessorList([CatalogueLogitsProcessor(catalogue, offsets, prompt)]))

    if model.config.is_encoder_decoder:

        @torch.no_grad()
        def ours():
            states = model.encoder(ids).last_hidden_state
            decoder = T5Beams(model, catalogue, offsets, states, torch.ones_like(ids).bool()[:, None, None])
            found = search(decoder, BeamSearch(), catalogue, batch, beams)
            return {"sequences_scores": found.scores.flatten() / catalogue.num_levels}

    else:
        fast = {
            "custom_generate": catalogue_generate,
            "search_beams": beams,
            "catalogue": catalogue,
            "level_offsets": offsets,
        }
        ours = partial(model.generate, ids, **fast, max_new_tokens=catalogue.num_levels, return_dict_in_generate=True)
    return _named(loop, trie, prompt, processor, ours)


def _named(loop, trie, prompt, processor, ours) -> dict:
    constrained = partial(loop, prefix_allowed_tokens_fn=allowed_tokens(trie, prompt))
    return {"unconstrained": loop, "dict trie": constrained, "processor": processor, "ours": ours}


def breakdown(way, runs: int = 5) -> dict[str, float]:
    """Processor milliseconds of one run by kind of operation; `rest` is Python and small operations."""
    found, start = {}, time.process_time()
    for _ in range(runs):
        way()
    total = 1e3 * (time.process_time() - start) / runs
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            way()
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        if name in OPERATIONS:
            found[name] = event.cpu_time_total / 1e3 / runs
    return found | {"rest": total - sum(found.values()), "total": total}


def measure(
    model, catalogue, trie, batch: int, context: int, beams: int, repeats: int, compiled: bool = False
) -> dict:
    torch.compiler.reset()  # else a second case is compiled for any shape
    ways = ways_of(model, catalogue, trie, batch, context, beams, compiled)
    expected, flops = count_flops(ways["ours"])
    expected = expected["sequences_scores"]
    for name in ways.keys() - {"unconstrained", "ours"}:
        found = ways[name]()["sequences_scores"]
        live = expected.isfinite() & (found > -1e8)  # transformers fills up with -1e9
        assert torch.allclose(found[live], expected[live], atol=2e-3), (
            f"{name}: {(found - expected)[live].abs().max()}"
        )
    seconds, least = alternate(ways, repeats)
    row = {"items": catalogue.num_items, "batch": batch, "context": context, "beams": beams, "seconds": seconds}
    # in a row, as in a server: after a peer's gigabytes the caches are cold, those of the large product never are
    in_a_row = {name: alternate({name: way}, 10)[1][name] for name, way in ways.items() if "ours" in name}
    floor = flops / machine_flops()
    row |= {"least": least, "flops": flops, "in_a_row": in_a_row}
    row["floor"] = {name: least / floor for name, least in in_a_row.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="OneRecV2ForCausalLM")
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--zipf", type=float, default=0.5)
    parser.add_argument("--parquet", type=Path, help="a real catalogue instead: a file with a column of code lists")
    parser.add_argument("--column", default="rqkmeans")
    parser.add_argument("--codebook", type=int, default=8192)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="one way more: our search compiled (minutes for each case)"
    )
    parser.add_argument("--profile", action="store_true", help="only say where the time of our search goes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    others = ("unconstrained", "dict trie", "processor") + ("ours, compiled",) * args.compile
    print(
        "| items | batch | context | beams | ours, s | "
        + " | ".join(f"{n} / ours" for n in others)
        + " | processor / unconstrained | floor |"
    )
    print("|---" * (7 + len(others)) + "|")
    for num_items in args.items if args.parquet is None else [None]:
        if num_items is None:
            codes = read_catalogue(args.parquet, args.column)
        else:
            codes = zipf_catalogue(num_items, args.codebook, args.levels, args.zipf)
        sizes = [args.codebook] * codes.shape[1]
        model = make_model(args.model, sizes, args.config)
        start = time.process_time()
        catalogue = Catalogue(codes, sizes)
        build = time.process_time() - start
        trie = dict_trie(codes, OneRecV2Config(codebook_sizes=sizes).level_offsets)
        for batch in args.batches:
            for context in args.contexts:
                for beams in args.beams:
                    if args.profile:
                        way = ways_of(model, catalogue, trie, batch, context, beams)["ours"]
                        parts = {name: round(value, 1) for name, value in breakdown(way).items()}
                        print(f"batch {batch}, context {context}, {beams} beams, ms: {parts}")
                        continue
                    row = measure(model, catalogue, trie, batch, context, beams, args.repeats, args.compile)
                    rows.append(row | {"build_seconds": build})
                    seconds = row["seconds"]
                    ratios = " | ".join(f"{seconds[name] / seconds['ours']:.1f}x" for name in others)
                    overhead = seconds["processor"] / seconds["unconstrained"] - 1
                    print(
                        f"| {len(codes):,} | {batch} | {context} | {beams} | {seconds['ours']:.3f} | {ratios} | "
                        f"{overhead:+.0%} | {' / '.join(f'{floor:.1f}' for floor in row['floor'].values())} |",
                        flush=True,
                    )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.output.write_text(json.dumps({"arguments": arguments, "rows": rows}, indent=2))
        title = f"{args.model}, {sizes[0]} codes x {len(sizes)}, {args.threads} thread"
        label = "{items:,} items\nbatch {batch}\ncontext {context}\n{beams} beams".format_map
        bars(args.output.with_suffix(".png"), rows, label, title)


if __name__ == "__main__":
    main()
