"""Selection alone: from the log-probabilities of a model's steps to the K best items, ours against other searches.

    pip install \\
        --no-deps flashrec==0.1.2   # its dependencies want CUDA and transformers 4; its selection needs torch alone
    python benchmarks/selection.py --output outputs/selection.json
    python benchmarks/selection.py --items 10000000 --zipf 0.5 --skip "dict trie" flashrec \\
        --output outputs/selection_1e7.json
    python benchmarks/selection.py --parquet FILE --column rqkmeans --codebook 256 \\
        --output outputs/selection_beauty.json

Every way gets the same (rows, V) log-probabilities of one level, normalised within the level, of a random model: flat
ones, which is the hard case. Seconds are processor time, medians, the ways alternating.
`dict trie`: `PrefixConstrainedLogitsProcessor` and the top-2K of transformers' beam search. `flashrec`: its torch
path, the top-2K tokens of a beam first, then membership. `--other package.module:function` adds a way: the function
gets (codes, codebook_sizes) and returns a function of (score, batch, beams), see `Ours`. Before the timing each way
runs once on log-probabilities that depend on the prefix, against a mask over the whole codebook: exact ways must
return its scores, the recall of flashrec is printed.
"""

import argparse
import importlib
import json
import resource
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from other_ways import allowed_tokens, alternate, dict_trie, read_catalogue, zipf_catalogue
from pictures import curves
from transformers.generation import PrefixConstrainedLogitsProcessor

from onerec_hf import Catalogue
from onerec_hf.models.beam_search import BeamSearch, search


class Given:
    """A decoder whose hidden states are the codes so far and whose log-probabilities are ready."""

    def __init__(self, score, batch, device="cpu"):
        self.score, self.path = score, torch.zeros(batch, 1, 0, dtype=torch.long, device=device)

    def advance(self, level, code=None, parent=None):
        if code is not None:
            above = self.path.flatten(0, 1)[parent].view(*code.shape, level - 1)
            self.path = torch.cat([above, code.unsqueeze(2)], dim=2)
        return self.path

    def log_probs(self, hidden, level, node=None):
        return self.score(level, hidden)


class Ours:
    """`way(score, batch, beams)` -> codes (B, K, L), scores (B, K); score(level, codes (B, k, level)) -> (B * k,
    V).
    """

    def __init__(self, codes, sizes):
        self.catalogue = Catalogue(codes, sizes)
        tensors = self.catalogue.codes + self.catalogue.surplus[:-1]
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __call__(self, score, batch, beams):
        found = search(Given(score, batch), BeamSearch(), self.catalogue, batch, beams)
        return found.semantic_ids[:, :, 0], found.scores


class DictTrie:
    """transformers' beam search around `prefix_allowed_tokens_fn`: K rows per user from the first step on, top 2K."""

    def __init__(self, codes, sizes):
        self.trie = dict_trie(codes, [0] * len(sizes))
        self.levels = len(sizes)

    def __call__(self, score, batch, beams):
        processor = PrefixConstrainedLogitsProcessor(allowed_tokens(self.trie), beams)
        path = torch.zeros(batch, beams, 0, dtype=torch.long)
        total = torch.full((batch, beams), -1e9)
        total[:, 0] = 0.0
        for level in range(self.levels):
            log_probs = score(level, path)
            ids = torch.nn.functional.pad(path.flatten(0, 1), (1, 0), value=1)  # a prompt of one token
            log_probs = processor(ids, log_probs).view(batch, beams, -1) + total.unsqueeze(2)
            values, best = log_probs.flatten(1).topk(2 * beams)
            total, best = values[:, :beams], best[:, :beams]
            parent, code = best // log_probs.shape[2], best % log_probs.shape[2]
            path = torch.cat([path.gather(1, parent.unsqueeze(2).expand(-1, -1, level)), code.unsqueeze(2)], dim=2)
        return path, total


class FlashRec:
    """flashrec 0.1.2: `init_from_prefill_batch`, then one `expand_step` per request and level."""

    def __init__(self, codes, sizes):
        from flashrec.search.trie import build_trie_from_sequences

        self.offsets = [0, *np.cumsum(sizes)[:-1].tolist()]
        self.trie = build_trie_from_sequences((codes + np.array(self.offsets)).tolist())
        self.levels = len(sizes)
        self(
            lambda level, path: torch.zeros(path.shape[:2].numel(), sizes[level]), 1, 1
        )  # makes its tables on first use

    def __call__(self, score, batch, beams):
        from flashrec.search.expand import expand_step, init_from_prefill_batch

        log_probs = score(0, torch.zeros(batch, 1, 0, dtype=torch.long))
        token_ids = torch.arange(log_probs.shape[1])
        candidates = min(2 * beams, log_probs.shape[1])
        lists = init_from_prefill_batch(
            log_probs, beams, candidates, self.levels, [1] * batch, self.trie, candidate_token_ids=token_ids
        )
        offsets = torch.tensor(self.offsets)
        for level in range(1, self.levels):
            path = torch.stack([one.token_ids[:, :level] for one in lists]) - offsets[:level]
            values, tokens = score(level, path).topk(candidates, dim=1)
            tokens = tokens + self.offsets[level]
            for user, one in enumerate(lists):
                rows = slice(user * beams, user * beams + beams)
                expand_step(one, tokens[rows], values[rows], beams, self.trie, will_finish=level + 1 == self.levels)
        path = torch.stack([one.token_ids[:, : self.levels] for one in lists]) - offsets
        return path, torch.stack([one.cum_logprobs for one in lists])


def brute_force(codes, sizes):
    """The same beam search by a mask over the whole codebook: sets of prefixes, nothing clever."""
    levels = len(sizes)
    key = np.zeros(len(codes), dtype=np.int64)
    prefixes = []  # per level, the sorted keys of existing prefixes
    for level, size in enumerate(sizes):
        key = key * size + codes[:, level]
        prefixes.append(torch.from_numpy(np.unique(key)))

    def way(score, batch, beams):
        path, total = torch.zeros(batch, 1, 0, dtype=torch.long), torch.zeros(batch, 1)
        key = torch.zeros(batch, 1, dtype=torch.long)
        for level in range(levels):
            values = score(level, path).reshape(batch, -1, sizes[level]) + total.unsqueeze(2)
            longer = key.unsqueeze(2) * sizes[level] + torch.arange(sizes[level])
            place = torch.searchsorted(prefixes[level], longer).clamp(max=len(prefixes[level]) - 1)
            values = values.masked_fill(prefixes[level][place] != longer, float("-inf")).flatten(1)
            missing = beams - values.shape[1]
            values = torch.nn.functional.pad(values, (0, missing), value=float("-inf")) if missing > 0 else values
            total, best = values.topk(beams)
            best = best.masked_fill(total == float("-inf"), 0)
            parent = best // sizes[level]
            key = longer.flatten(1).gather(1, best)
            path = torch.cat([path[torch.arange(batch)[:, None], parent], (best % sizes[level]).unsqueeze(2)], dim=2)
        return path, total

    return way


def prefix_scores(sizes, scale, seed=0):
    """Log-probabilities that depend on the prefix, as a model's do: one of 64 random rows per level, chosen by the
    codes.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = [(scale * torch.randn(64, size, generator=generator)).log_softmax(-1) for size in sizes]
    return lambda level, path: pools[level][((path * 7919 + 13).cumsum(2).sum(2) % 64).flatten()]


def fixed_scores(sizes, batch, beams, scale):
    """Ready log-probabilities, so that only selection is timed; one row per user where a way asks for no more."""
    generator = torch.Generator().manual_seed(1)
    rows = [(scale * torch.randn(batch * beams, size, generator=generator)).log_softmax(-1) for size in sizes]
    return lambda level, path: rows[level][: path.shape[0] * path.shape[1]]


def recall(found, exact):
    """Share of the exact items that were found, and whether the scores agree."""
    hits = [len({*map(tuple, f)} & {*map(tuple, e)}) / len(e) for f, e in zip(found[0].tolist(), exact[0].tolist())]
    return float(np.mean(hits)), bool(torch.allclose(found[1], exact[1], atol=1e-4))


def build(kinds, codes, sizes) -> tuple[dict, dict]:
    ways, facts = {}, {}
    for name, kind in kinds.items():
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        ways[name] = kind(codes, sizes)
        facts[name] = {"build_seconds": time.process_time() - start}
        facts[name]["peak_memory_grew_by_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    facts["ours"]["bytes_per_semantic_id"] = ways["ours"].num_bytes / len(codes)
    allowed = torch.rand(1, len(codes), generator=torch.Generator().manual_seed(0)) < 0.9
    ours = ways["ours"].catalogue
    times = alternate({"build": partial(Ours, codes, sizes), "mask": partial(ours.node_masks, allowed)}, 5)
    for kind, seconds in zip(("median", "least"), times):
        facts["ours"] |= {f"build_seconds_{kind}": seconds["build"], f"subset_mask_seconds_{kind}": seconds["mask"]}
    return ways, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--zipf", type=float, nargs="+", default=[0.0, 0.5, 0.8])
    parser.add_argument("--codebook", type=int, default=8192)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--parquet", type=Path, help="a real catalogue instead: a file with a column of code lists")
    parser.add_argument("--column", default="rqkmeans")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 128])
    parser.add_argument("--scale", type=float, default=1.0, help="standard deviation of the logits")
    parser.add_argument("--skip", nargs="*", default=[], help="ways to leave out")
    parser.add_argument("--other", help="package.module:function, one way more")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kinds = {"dict trie": DictTrie, "flashrec": FlashRec, "ours": Ours}
    if args.other:
        module, function = args.other.split(":")
        kinds["other"] = getattr(importlib.import_module(module), function)
    kinds = {name: kind for name, kind in kinds.items() if name not in args.skip}
    cases = [(n, z) for n in args.items for z in args.zipf] if args.parquet is None else [(None, None)]
    rows = []
    print(
        "| catalogue | batch | beams | ours, ms | "
        + " | ".join(f"{name} / ours" for name in kinds if name != "ours")
        + " | recall |"
    )
    print("|---" * (4 + len(kinds)) + "|")
    for items, zipf in cases:
        if args.parquet is None:
            codes = zipf_catalogue(items, args.codebook, args.levels, zipf)
        else:
            codes = read_catalogue(args.parquet, args.column)
        sizes, items = [args.codebook] * codes.shape[1], len(codes)
        ways, facts = build(kinds, codes, sizes)
        print(f"| {items} zipf={zipf}: {json.dumps(facts)} |", flush=True)
        reference = brute_force(codes, sizes)
        for batch in args.batches:
            for beams in args.beams:
                score = prefix_scores(sizes, args.scale)
                exact = reference(score, 1, beams)
                checks = {name: recall(way(score, 1, beams), exact) for name, way in ways.items()}
                assert all(same for name, (_, same) in checks.items() if name in ("ours", "dict trie")), checks
                score = fixed_scores(sizes, batch, beams, args.scale)
                seconds, least = alternate(
                    {name: partial(way, score, batch, beams) for name, way in ways.items()}, args.repeats
                )
                row = {
                    "items": items,
                    "zipf": zipf,
                    "sizes": sizes,
                    "batch": batch,
                    "beams": beams,
                    "seconds": seconds,
                    "least": least,
                }
                row |= {"recall": {name: value for name, (value, _) in checks.items()}, "facts": facts}
                rows.append(row)
                ratios = [f"{seconds[name] / seconds['ours']:.1f}x" for name in kinds if name != "ours"]
                recalls = ", ".join(f"{name} {value:.3f}" for name, value in row["recall"].items())
                print(
                    f"| {items} zipf={zipf} | {batch} | {beams} | {1e3 * seconds['ours']:.2f} | {' | '.join(ratios)} "
                    f"| {recalls} |",
                    flush=True,
                )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.output.write_text(json.dumps({"arguments": arguments, "rows": rows}, indent=2))
        title = f"Selection of all steps, {max(args.beams)} beams, {args.threads} thread"
        curves(args.output.with_suffix(".png"), [row for row in rows if row["beams"] == max(args.beams)], title)


if __name__ == "__main__":
    main()
