"""Item embeddings to semantic IDs: residual k-means or RQ-VAE, collision policies, quality report."""

from .collisions import resolve_collisions
from .embedding_files import EmbeddingFiles
from .quality import plot_codebook_usage, quality_report
from .residual import ResidualKMeans
from .rqvae import RQVAE, load_quantizer

__all__ = [
    "RQVAE",
    "EmbeddingFiles",
    "ResidualKMeans",
    "load_quantizer",
    "plot_codebook_usage",
    "quality_report",
    "resolve_collisions",
]
