"""Item embeddings to semantic IDs: residual k-means, collision policies, quality report."""

from .collisions import resolve_collisions
from .quality import plot_codebook_usage, quality_report
from .residual import ResidualKMeans

__all__ = ["ResidualKMeans", "plot_codebook_usage", "quality_report", "resolve_collisions"]
