"""What a collator knows beside the semantic IDs, saved with the model: lengths, feature buckets, the items' categories.

With it a repository can be served: histories of item ids in, the tensors that the model was trained on out.
"""

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers.utils.hub import cached_file

from .collators import OneRecCollator, SessionCollator
from .pathways import PathwayCollator

CONFIG_NAME, WEIGHTS_NAME = "collator_config.json", "collator.safetensors"
_CLASSES = {cls.__name__: cls for cls in (OneRecCollator, SessionCollator, PathwayCollator)}


def save_collator(collator: OneRecCollator, folder: str | os.PathLike) -> None:
    """Writes `collator_config.json`, and `collator.safetensors` with the categories of the items where there are any.

    The rows of the users stay behind: they are those of a training set, not of the users that a model is served for. Which category
    each value of a user feature became is saved.
    """
    config = {
        "collator_class": type(collator).__name__,
        **collator.settings,
        "event_features": {name: list(feature) for name, feature in collator.event_features.items()},
        "item_features": sorted(collator.item_features),
        "user_features": collator.user_feature_sizes,
        "user_categories": collator.user_categories,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if collator.item_features:
        save_file(
            {name: v.astype(np.int64) for name, v in collator.item_features.items()}, Path(folder) / WEIGHTS_NAME
        )


def load_collator(repo: str | os.PathLike, item_token_ids: np.ndarray, **hub_kwargs) -> OneRecCollator:
    """
    The collator of a folder or Hub repository.

    Args:
        item_token_ids (`np.ndarray` of shape (N, L)): Token ids of every item of the repository's catalogue.
        hub_kwargs: `revision`, `token`, `cache_dir`, ... as `from_pretrained` takes them.

    Raises:
        OSError: When the repository has no `collator_config.json`.
        ValueError: When the saved categories are not those of the catalogue's items.
    """
    path = cached_file(str(repo), CONFIG_NAME, **hub_kwargs)
    try:
        config = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}): it is cut off. Save or download it again.") from error
    name = config.pop("collator_class")
    if name not in _CLASSES:
        raise ValueError(
            f"{repo}: {CONFIG_NAME} names the collator {name!r}, known are {sorted(_CLASSES)}. Update onerec_hf."
        )
    features = config.pop("item_features")
    items = _tables(cached_file(str(repo), WEIGHTS_NAME, **hub_kwargs)) if features else {}
    if short := [name for name in features if len(items[name]) != len(item_token_ids)]:
        raise ValueError(
            f"{repo}: {WEIGHTS_NAME} has {len(items[short[0]])} categories of {short[0]!r}, the catalogue {len(item_token_ids)} "
            "items: the files are not of one model."
        )
    # a table with the highest category alone: the sizes are those of the model, the users come with each request
    users = {name: np.array([size - 1]) for name, size in config.pop("user_features").items()}
    return _CLASSES[name](item_token_ids, item_features=items, user_features=users, **config)


def _tables(path: str | None) -> dict[str, np.ndarray]:
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): it is cut off. Save or download it again.") from error


__all__ = ["load_collator", "save_collator"]
