"""What a target item costs: encoder-decoder 1:1 and 1:2, naive decoder-only and lazy decoder-only, at equal
parameters.

    python benchmarks/architectures.py --threads 1 --output outputs/architectures.json --plot outputs/architectures.png

OneRec-V2 (arXiv:2508.20900), Tables 1 to 4, redone. Five impressions of one request share its context, a context item
is one token everywhere, widths and depths are those of the paper's Table 5 (1:1 and 1:2 share out the blocks), and the
feed-forward of every contestant is as wide as it takes for equally many parameters in the blocks. Encoder-decoders are
`OneRecV1ForCausalLM` with the positive-feedback pathway alone; the naive decoder is transformers' own Llama over
[context items | BOS s1 s2 of each target], where a target sees the context and itself.

FLOPs (forward and backward, every matrix product) and elements saved for the backward pass (attention fused) are
counted on tensors without data; the lazy decoder is counted as printed, without the learned bias over ages that is
this package's own. Measured, with the bias, at the width of 0.1B and `--layers` blocks: training time (process CPU
time of forward and backward; an optimiser step costs all of them the same) and peak memory (gradients included).
Before that, the naive decoder is checked to give a target the same loss alone and beside four others.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from statistics import median

import matplotlib
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from onerec_hf import OneRecV1Config, OneRecV1ForCausalLM, OneRecV2Config, OneRecV2ForCausalLM

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PRESETS = Path(__file__).resolve().parents[1] / "recipes" / "configs" / "models"
SIZES = ("0.1B", "0.5B", "1B")
NAMES = ("encoder-decoder 1:1", "encoder-decoder 1:2", "naive decoder-only", "lazy decoder-only")
TARGETS, SPECIALS, CODES = 5, 4, 8192  # k, and the vocabulary of all sizes
# GFLOPs per target and saved elements in billions at a batch of 512 targets (Table 2, context about 512), by size
PAPER = {
    "encoder-decoder 1:1": [(25.64, 4.21), (142.73, 10.79), (296.36, 17.63)],
    "encoder-decoder 1:2": [(17.72, 2.92), (104.73, 7.94), (204.21, 12.20)],
    "naive decoder-only": [(63.78, 7.52), (317.68, 19.28), (634.83, 31.53)],
    "lazy decoder-only": [(1.98, 0.31), (9.55, 0.77), (18.89, 1.24)],
}
PAPER_3000 = {"encoder-decoder 1:1": 1988, "naive decoder-only": 3618, "lazy decoder-only": 18}  # Table 1, 1B
# Tables 3 and 4, 1B: change -> GFLOPs, saved elements in billions
SHARING = {
    "L_kv=1, S_kv=1, G_kv=14": ({}, 18.89, 1.24),
    "S_kv=2": ({"context_key_value_split": 2}, 19.19, 1.33),
    "L_kv=3": ({"num_context_layers": 3}, 19.49, 1.42),
    "L_kv=9": ({"num_context_layers": 9}, 21.27, 1.99),
    "L_kv=18": ({"num_context_layers": 18}, 23.95, 2.83),
    "G_kv=7": ({"num_context_key_value_heads": 7}, 18.74, 1.19),
    "G_kv=2": ({"num_context_key_value_heads": 2}, 18.64, 1.16),
    "G_kv=1": ({"num_context_key_value_heads": 1}, 18.62, 1.15),
    "with the bias over ages": ({"context_position": "bias"}, None, None),
}


class NaiveDecoder(nn.Module):
    """A plain causal language model over items: context items as one token each, then three tokens of every target."""

    def __init__(self, settings: dict, intermediate_size: int, attention: str):
        super().__init__()
        width, dim, heads = settings["hidden_size"], settings["context_embed_dim"], settings["num_attention_heads"]
        self.embed_codes = nn.Embedding(SPECIALS + 3 * CODES, dim)
        self.item_proj = nn.Linear(3 * dim, width, bias=False)
        config = LlamaConfig(
            vocab_size=SPECIALS + 3 * CODES,
            hidden_size=width,
            intermediate_size=intermediate_size,
            num_hidden_layers=settings["num_hidden_layers"],
            num_attention_heads=heads,
            head_dim=width // heads,
            attn_implementation=attention,
        )
        self.decoder = LlamaModel(config)
        self.lm_head = nn.Linear(width, SPECIALS + 3 * CODES, bias=False)

    def forward(self, context_ids, target_ids):
        """Mean negative log-probability of the codes; `context_ids` (B, T, 3), `target_ids` (B, n, 3)."""
        items, targets, device = context_ids.shape[1], target_ids.shape[1], context_ids.device
        tokens = self.decoder.embed_tokens(F.pad(target_ids, (1, -1), value=1).flatten(1))  # BOS s1 s2 of each
        states = torch.cat([self.item_proj(self.embed_codes(context_ids).flatten(2)), tokens], dim=1)
        position = torch.arange(states.shape[1], device=device)
        target = (position - items).div(3, rounding_mode="floor").clamp(min=-1)  # -1: the context
        allowed = (position[:, None] >= position) & ((target == -1) | (target[:, None] == target))
        mask = torch.zeros_like(allowed, dtype=states.dtype).masked_fill(~allowed, torch.finfo(states.dtype).min)
        position = torch.where(target == -1, position, items + (position - items) % 3)
        states = self.decoder(
            inputs_embeds=states, attention_mask=mask[None, None], position_ids=position[None], use_cache=False
        ).last_hidden_state[:, items:]
        loss = 0.0
        for level, own in enumerate(states.unflatten(1, (targets, 3)).unbind(2)):
            first = SPECIALS + level * CODES
            logits = F.linear(own, self.lm_head.weight[first : first + CODES])
            loss = loss + F.cross_entropy(logits.flatten(0, 1), (target_ids[..., level] - first).flatten()) / 3
        return loss


def settings_of(size: str) -> dict:
    settings = yaml.safe_load((PRESETS / f"onerec_v2_{size.lower()}.yaml").read_text())
    return {name: value for name, value in settings.items() if name != "model_type"}


def block_parameters(settings: dict) -> int:
    """Of the lazy decoder: 6 d^2 of attention and 3 d d_ff of feed-forward per block."""
    width = settings["hidden_size"]
    return settings["num_hidden_layers"] * (6 * width**2 + 3 * width * settings["intermediate_size"])


def rounded(width: float) -> int:
    return 16 * round(width / 16)


def build(name: str, size: str, context: int, attention: str, **changes):
    """One contestant and a function from a batch to its loss."""
    settings = settings_of(size) | changes
    width, layers = settings["hidden_size"], settings["num_hidden_layers"]
    budget = block_parameters(settings)
    if name == "lazy decoder-only":
        config = OneRecV2Config(**settings)
        config._attn_implementation = attention
        model = OneRecV2ForCausalLM(config)
    elif name == "naive decoder-only":
        model = NaiveDecoder(settings, rounded((budget / layers - 4 * width**2) / (3 * width)), attention)
        return model, model
    else:
        encoders = round(layers / (2 if name.endswith("1:1") else 3))
        # 4 d^2 of attention in an encoder block, 8 d^2 in a decoder block with the keys and values of the context
        products = budget - (4 * encoders + 8 * (layers - encoders)) * width**2
        config = OneRecV1Config(
            **settings | {"intermediate_size": rounded(products / (3 * width * layers)), "gated_mlp": True},
            code_embed_dim=settings["context_embed_dim"],
            num_encoder_layers=encoders,
            short_term_length=0,
            positive_length=context,
            lifelong_length=0,
            num_experts=0,
        )
        config.num_hidden_layers = layers - encoders
        config._attn_implementation = attention
        model = OneRecV1ForCausalLM(config)
    return model, lambda context_ids, target_ids: model(context_ids=context_ids, target_ids=target_ids).loss


def batch(requests: int, context: int, device: str = "cpu", seed: int = 0) -> dict:
    first = torch.tensor([SPECIALS + level * CODES for level in range(3)], device=device)
    shapes = {"context_ids": (requests, context, 3), "target_ids": (requests, TARGETS, 3)}
    torch.manual_seed(seed)
    return {name: torch.randint(CODES, shape, device=device) + first for name, shape in shapes.items()}


def blocks_of(model) -> int:
    parts = [model.decoder.layers] if isinstance(model, NaiveDecoder) else [model.model.decoder.layers]
    if isinstance(model, OneRecV1ForCausalLM):
        parts += [model.model.context_processor.layers, model.model.context_processor.key_values]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def count_flops(name: str, size: str, context: int, **changes) -> tuple[nn.Module, FlopCounterMode]:
    """One contestant without data, and the FLOPs of one request."""
    with torch.device("meta"):
        model, loss_of = build(name, size, context, "eager", **changes)
        with FlopCounterMode(display=False) as counter:
            loss_of(**batch(1, context, "meta")).backward()
    return model, counter


def counted(name: str, size: str, context: int, **changes) -> dict:
    """FLOPs per target; elements that a batch of 512 targets saves for the backward pass, attention fused."""
    if name == "lazy decoder-only":
        changes = {"context_position": "none"} | changes
    model, counter = count_flops(name, size, context, **changes)
    saved = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes() // tensor.element_size()
        return tensor

    with FakeTensorMode():  # as on the CPU, without its memory: the meta device has no fused attention
        fused, loss_of = build(name, size, context, "sdpa", **changes)
        weights = {parameter.untyped_storage()._cdata for parameter in fused.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            loss = loss_of(**batch(1, context))
        elements = sum(count for storage, count in saved.items() if storage not in weights)
        del loss
    products = {str(op).split(".")[1]: count for op, count in counter.get_flop_counts()["Global"].items()}
    return {
        "name": name,
        "size": size,
        "context": context,
        "block_parameters": blocks_of(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflops_per_target": counter.get_total_flops() / TARGETS / 1e9,
        "gflops_of_attention": products["bmm"] / TARGETS / 1e9,  # products of activations; the rest multiplies weights
        "saved_elements_512": elements / TARGETS * 512 / 1e9,
    }


def check_naive() -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "context_embed_dim": 8, "num_attention_heads": 4, "num_hidden_layers": 2}
    model, data = NaiveDecoder(settings, 64, "sdpa"), batch(2, 7)
    alone = [model(data["context_ids"], data["target_ids"][:, i : i + 1]) for i in range(TARGETS)]
    assert torch.allclose(sum(alone) / TARGETS, model(**data), atol=1e-5), "targets see each other"


def memory_of_process(field: str) -> int:
    """Bytes, from the kernel's account of this process: `VmRSS` now, `VmHWM` at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(name: str, context: int, requests: int, layers: int, threads: int) -> float:
    """GiB beyond the weights that one training step needs; called in a process of its own."""
    torch.set_num_threads(threads)
    _, loss_of = build(name, "0.1B", context, "sdpa", num_hidden_layers=layers)
    data = batch(requests, context)
    before = memory_of_process("VmRSS")
    loss_of(**data).backward()
    return round((memory_of_process("VmHWM") - before) / 2**30, 2)


def measured(context: int, requests: int, repeats: int, memory: bool, layers: int, threads: int) -> list[dict]:
    """CPU seconds per target and peak GiB; the contestants alternate."""
    data, seconds = batch(requests, context), {name: [] for name in NAMES}
    contestants = {name: build(name, "0.1B", context, "sdpa", num_hidden_layers=layers) for name in NAMES}
    for _ in range(repeats):
        for name, (model, loss_of) in contestants.items():
            start = time.process_time()
            loss_of(**data).backward()
            seconds[name].append((time.process_time() - start) / (requests * TARGETS))
            model.zero_grad()
    parameters = {name: blocks_of(model) for name, (model, _) in contestants.items()}
    del contestants
    peaks = dict.fromkeys(NAMES)
    if memory:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            arguments = [(name, context, requests, layers, threads) for name in NAMES]
            peaks = dict(zip(NAMES, pool.starmap(peak_memory, arguments, chunksize=1)))
    return [
        {"name": name, "context": context, "requests": requests, "repeats": repeats, "layers": layers}
        | {"block_parameters": parameters[name], "cpu_seconds_per_target": median(seconds[name])}
        | {"all_seconds": seconds[name], "peak_gib": peaks[name]}
        for name in NAMES
    ]


def table(rows: list[dict], columns: dict[str, str]) -> None:
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        row = {name: "-" if value is None else value for name, value in row.items()}
        print("| " + " | ".join(pattern.format(**row) for pattern in columns.values()) + " |")
    print()


def plot(report: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    bars = torch.arange(len(NAMES)).numpy()
    for axis, context in zip(axes, (512, 3000)):
        ours = [row for row in report["counted"] if row["size"] == "1B" and row["context"] == context]
        axis.barh(bars - 0.2, [row["gflops_per_target"] for row in ours], 0.38, label="counted here")
        paper = [row["paper_gflops"] or 0 for row in ours]
        axis.barh(bars + 0.2, paper, 0.38, label="paper (Table 2)" if context == 512 else "paper (Table 1)")
        for bar, row in zip(bars, ours):
            for shift, value in ((-0.2, row["gflops_per_target"]), (0.2, row["paper_gflops"])):
                axis.text(
                    value or 1.2, bar + shift, f" {value:,.0f}" if value else "not given", va="center", fontsize=8
                )
        axis.set(xscale="log", xlim=(1, 2e4), title=f"1B parameters, context {context}", yticks=bars)
        axis.set_xlabel("GFLOPs per target item, forward + backward (log scale)")
        axis.set_yticklabels(NAMES)
        axis.legend(loc="lower right", fontsize=8)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def count_all() -> dict:
    rows = []
    for index, size in enumerate(SIZES):
        for name in NAMES:
            gflops, saved = PAPER[name][index]
            rows.append(counted(name, size, 512) | {"paper_gflops": gflops, "paper_saved": saved})
    for name in NAMES:
        rows.append(counted(name, "1B", 3000) | {"paper_gflops": PAPER_3000.get(name), "paper_saved": None})
    sharing = []
    for label, (change, gflops, saved) in SHARING.items():
        row = counted("lazy decoder-only", "1B", 512, **change)
        sharing.append(row | {"name": label, "paper_gflops": gflops, "paper_saved": saved})
    return {"counted": rows, "sharing": sharing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action=argparse.BooleanOptionalAction, default=True, help="Count FLOPs too.")
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 3000], help="Contexts that are timed.")
    parser.add_argument("--requests", type=int, nargs="*", default=[2, 1], help="Requests per batch, per context.")
    parser.add_argument("--repeats", type=int, nargs="*", default=[3, 1], help="Per context.")
    parser.add_argument("--memory", type=int, nargs="*", default=[512], help="Contexts whose peak memory is measured.")
    parser.add_argument("--layers", type=int, default=6, help="Blocks of the timed models.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    check_naive()
    report = (count_all() if args.count else {}) | {"measured": []}
    columns = {
        "architecture": "{name}",
        "size": "{size}",
        "context": "{context}",
        "parameters in blocks": "{block_parameters:,}",
    }
    columns |= {"GFLOPs per target": "{gflops_per_target:.2f}", "of it attention": "{gflops_of_attention:.2f}"}
    columns |= {"paper": "{paper_gflops}"}
    columns |= {"saved elements, 512 targets, 1e9": "{saved_elements_512:.2f}", "paper ": "{paper_saved}"}
    for part in ("counted", "sharing"):
        table(report.get(part, []), columns)
    for context, requests, repeats in zip(args.contexts, args.requests, args.repeats):
        memory = context in args.memory
        report["measured"] += measured(context, requests, repeats, memory, args.layers, args.threads)
    columns = {"width of 0.1B": "{name}", "blocks": "{layers}", "parameters in blocks": "{block_parameters:,}"}
    columns |= {"context": "{context}", "requests": "{requests}", "repeats": "{repeats}"}
    columns |= {"CPU s per target": "{cpu_seconds_per_target:.3f}", "peak GiB beyond weights": "{peak_gib}"}
    table(report["measured"], columns)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"threads": args.threads, "torch": torch.__version__} | report, indent=2))
    if args.plot and args.count:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
