"""Quality of semantic IDs: the metrics of the OneRec Technical Report, arXiv:2506.13695, Table 11, and collisions."""

import math
from pathlib import Path

import numpy as np
import torch

from .collisions import row_ids
from .distances import row_blocks
from .embedding_files import EmbeddingFiles
from .residual import ResidualKMeans
from .rqvae import RQVAE


def quality_report(
    codes: torch.Tensor, item_embeddings: torch.Tensor | EmbeddingFiles, quantizer: ResidualKMeans | RQVAE
) -> dict:
    """Numbers that say how good a catalogue's semantic IDs are. Lists have one entry per level of the quantizer.

    Args:
        codes (`torch.LongTensor` of shape `(num_items, num_levels)`): or one level more, appended by the collision
            policy `"extra_level"`, which then counts in the three numbers about collisions and in no other.
        item_embeddings (`torch.FloatTensor` or `EmbeddingFiles` of shape `(num_items, embedding_dim)`): the same rows
            on the same device.
        quantizer (`ResidualKMeans` or `RQVAE`): fitted.

    Returns:
        `dict` of plain numbers, ready for JSON:

        - `num_items`, `codebook_size`
        - `reconstruction_mse`: mean over items *and* elements of `(x - decode(codes))^2`.
        - `reconstruction_relative`: the same sum over the sum of squared deviations of the items from their mean. 0 is
          perfect, 1 is one code for all. The Technical Report does not say how it normalises, so only ratios compare
          with its Table 11.
        - `utilisation`: share of the codes that some item has.
        - `entropy`: Shannon entropy of the code histogram in nats; `entropy_percent`: in percent of `ln K`.
        - `collision_rate`: share of items that share their semantic ID with another item.
        - `distinct_share`: number of distinct semantic IDs over number of items.
        - `largest_group`: most items with one semantic ID.
    """
    if not isinstance(item_embeddings, EmbeddingFiles):
        item_embeddings = torch.as_tensor(item_embeddings)
    levels, size = quantizer.num_levels, quantizer.codebook_size
    if codes.ndim != 2 or codes.shape[1] not in (levels, levels + 1) or len(codes) != len(item_embeddings):
        raise ValueError(
            f"`codes` has shape {tuple(codes.shape)}; expected ({len(item_embeddings)}, {levels}), or one column more "
            "after "
            'the collision policy "extra_level".'
        )
    squared_error, deviation = 0.0, 0.0
    if isinstance(item_embeddings, EmbeddingFiles):
        mean = item_embeddings.mean()
    else:
        mean = item_embeddings.mean(dim=0, dtype=torch.float64).float()
    for block in row_blocks(len(item_embeddings), item_embeddings.shape[1], item_embeddings.device):
        items = item_embeddings[block].float()
        decoded = quantizer.decode(codes[block, :levels])
        squared_error += (items - decoded).double().square().sum().item()
        deviation += (items - mean).double().square().sum().item()
    histograms = [torch.bincount(codes[:, level], minlength=size).double() for level in range(levels)]
    entropies = [_entropy(histogram) for histogram in histograms]
    groups = torch.bincount(row_ids(codes))
    return {
        "num_items": len(codes),
        "codebook_size": size,
        "reconstruction_mse": squared_error / (len(codes) * item_embeddings.shape[1]),
        "reconstruction_relative": squared_error / deviation if deviation > 0 else 0.0,
        "utilisation": [(histogram > 0).double().mean().item() for histogram in histograms],
        "entropy": entropies,
        "entropy_percent": [100 * entropy / math.log(size) for entropy in entropies],
        "collision_rate": groups[groups > 1].sum().item() / len(codes),
        "distinct_share": len(groups) / len(codes),
        "largest_group": int(groups.max()),
    }


def _entropy(histogram: torch.Tensor) -> float:
    shares = histogram[histogram > 0] / histogram.sum()
    return -(shares * shares.log()).sum().item()


def plot_codebook_usage(codes: torch.Tensor, codebook_size: int, path: str | Path) -> None:
    """Draws how many items every code has, one panel per level, and writes a PNG.

    Codes are sorted by use; the dashed line is what every code would have if all had the same.

    Args:
        codes (`torch.LongTensor` of shape `(num_items, num_levels)`): without a level that a collision policy
            appended.
        codebook_size (`int`): K.
        path (`str` or `Path`): file to write, `.png`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("`plot_codebook_usage` draws with matplotlib: `pip install matplotlib`.") from error
    codes = torch.as_tensor(codes).cpu()
    num_items, levels = codes.shape
    if int(codes.max()) >= codebook_size:
        raise ValueError(f"`codes` holds {int(codes.max())}, but `codebook_size` is {codebook_size}.")
    figure = Figure(figsize=(1 + 3.4 * levels, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, levels, sharey=True, squeeze=False)[0]
    even = num_items / codebook_size
    for level, axis in enumerate(axes):
        histogram = torch.bincount(codes[:, level], minlength=codebook_size)
        used = int((histogram > 0).sum())
        percent = 100 * _entropy(histogram.double()) / math.log(codebook_size)
        counts = histogram.sort(descending=True).values.numpy()
        axis.stairs(counts, np.arange(codebook_size + 1), fill=True, color="#4c78a8", alpha=0.85, linewidth=0)
        axis.axhline(even, color="#333333", linestyle=(0, (5, 3)), linewidth=1.1)
        axis.set_title(f"Level {level + 1}", fontsize=11, fontweight="bold", loc="left")
        axis.set_title(
            f"{used} of {codebook_size} used, entropy {percent:.1f} %", fontsize=8.5, color="#555555", loc="right"
        )
        axis.set_xlim(0, codebook_size)
        axis.set_xticks([0, codebook_size // 4, codebook_size // 2, 3 * codebook_size // 4, codebook_size])
        axis.set_xlabel("codes, most used first", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylim(0, max(axes[0].get_ylim()[1], 1.25 * even))
    axes[0].set_ylabel("items per code", fontsize=9)
    axes[-1].annotate(
        f"even: {even:,.4g}",
        (codebook_size, even),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8.5,
        color="#333333",
        ha="right",
    )
    figure.set_layout_engine("constrained", wspace=0.05)
    figure.savefig(path)
