"""A recommender behind HTTP: `create_app` makes the application, `onerec serve` runs it. Needs `onerec_hf[serve]`."""

from .application import create_app
from .bundles import save_bundle
from .limits import Limits
from .server import server

__all__ = ["Limits", "create_app", "save_bundle", "server"]
