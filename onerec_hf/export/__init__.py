"""A trained model as graphs that run without this package, and a search over them. Needs `onerec_hf[export]`."""

from .folder import export_recommender
from .numpy_search import ExportedRecommender
from .steps import export_steps

__all__ = ["ExportedRecommender", "export_recommender", "export_steps"]
