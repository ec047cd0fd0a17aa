"""OneRec for the Hugging Face ecosystem. `import onerec_hf` registers the models with transformers' Auto classes."""

from . import models, pipeline  # noqa: F401  pipeline registers its task
from ._version import __version__
from .models import *  # noqa: F403

__all__ = ["__version__", *models.__all__]
