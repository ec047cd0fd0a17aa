"""Quality of semantic IDs: reconstruction, utilisation, entropy, collisions (OneRec Technical Report, arXiv:2506.13695, Table 11)."""

import math
from pathlib import Path

import numpy as np
import torch

from .residual import ResidualKMeans


def quality_report(
    codes: torch.Tensor, item_embeddings: torch.Tensor | np.ndarray, quantizer: ResidualKMeans
) -> dict[str, float | list[float]]:
    """
    Numbers of Table 11, and how many items share a semantic ID.

    Args:
        codes (`torch.LongTensor` of shape `(num_items, num_levels)`): every code from 0 to K - 1.
        item_embeddings (`(num_items, embedding_dim)`): what they stand for.
        quantizer (`ResidualKMeans`): fitted, with as many levels.

    Returns:
        `dict` with `reconstruction_loss` (mean squared error per element), `relative_reconstruction_loss` (the same over the variance of
        the embeddings around their mean; 0 is exact, 1 is no better than the mean), and per level `utilisation` (share of codes that
        some item uses), `entropy` (Shannon entropy of the code histogram in nats) and `relative_entropy` (over ln K); then
        `collision_rate` (share of items whose semantic ID another item has as well), `distinct_rate` (distinct semantic IDs over
        items) and `largest_collision` (items of the most crowded semantic ID).
    """
    item_embeddings = torch.as_tensor(item_embeddings)
    error = variance = 0.0
    mean = item_embeddings.double().mean(0)
    for rows in torch.arange(len(codes)).split(65_536):
        part = item_embeddings[rows].double()
        error += (part - quantizer.decode(codes[rows]).double()).square().sum().item()
        variance += (part - mean).square().sum().item()
    size = quantizer.codebook_size
    histograms = [torch.bincount(codes[:, level], minlength=size).double() for level in range(codes.shape[1])]
    shares = [histogram / histogram.sum() for histogram in histograms]
    entropy = [-(share * share.clamp_min(1e-300).log()).sum().item() for share in shares]
    counts = torch.unique(codes, dim=0, return_counts=True)[1]
    return {
        "num_items": len(codes),
        "reconstruction_loss": error / item_embeddings.numel(),
        "relative_reconstruction_loss": error / variance if variance else 0.0,
        "utilisation": [(histogram > 0).double().mean().item() for histogram in histograms],
        "entropy": entropy,
        "relative_entropy": [value / math.log(size) for value in entropy],
        "collision_rate": counts[counts > 1].sum().item() / len(codes),
        "distinct_rate": len(counts) / len(codes),
        "largest_collision": counts.max().item(),
    }


def plot_codebook_usage(codes: torch.Tensor | np.ndarray, codebook_size: int, path: str | Path) -> None:
    """
    Picture (PNG): items per code, codes sorted by use, one line per level; a flat line is a balanced level.

    Args:
        codes (`(num_items, num_levels)`): levels beyond the codebooks (an extra level) may have fewer codes.
        codebook_size (`int`): K.
    """
    from matplotlib.figure import Figure  # only pictures need matplotlib

    codes = torch.as_tensor(codes)
    figure = Figure(figsize=(6.0, 3.4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    for level in range(codes.shape[1]):
        used = torch.bincount(codes[:, level].long(), minlength=codebook_size).sort(descending=True).values
        axes.plot(range(1, len(used) + 1), used, label=f"level {level + 1}", drawstyle="steps-mid")
    axes.axhline(len(codes) / codebook_size, color="grey", linewidth=0.8, linestyle=":", label="perfectly even")
    axes.set_xlabel("code, most used first")
    axes.set_ylabel("items")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=codes.shape[1] + 1, frameon=False)
    figure.savefig(path)
