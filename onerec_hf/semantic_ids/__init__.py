"""Item embeddings to semantic IDs: residual k-means, collision policies, quality report."""
