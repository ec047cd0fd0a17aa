"""Item embeddings to semantic IDs: residual k-means or RQ-VAE, collision policies, quality report."""

from .collisions import append_codes, resolve_collisions
from .embedding_files import EmbeddingFiles, UnitFiles
from .quality import plot_codebook_usage, quality_report
from .residual import ResidualKMeans
from .rqvae import RQVAE, codebook_fingerprint, load_quantizer

__all__ = [
    "RQVAE",
    "EmbeddingFiles",
    "ResidualKMeans",
    "UnitFiles",
    "append_codes",
    "codebook_fingerprint",
    "load_quantizer",
    "plot_codebook_usage",
    "quality_report",
    "resolve_collisions",
]
