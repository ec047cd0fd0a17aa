"""The collator that lies beside a model, or the one that its config describes."""

import os
from typing import Any

import numpy as np
from transformers.utils.hub import cached_file

from .onerec_collator import CONFIG_NAME, OneRecCollator, SessionCollator
from .pathway_collator import PathwayCollator


def collator_of(model: Any, *repos: str | os.PathLike, **hub_kwargs) -> OneRecCollator:
    """
    The collator of the first of `repos` that holds one; without one, that of a model without features.

    Args:
        model: A OneRec model with a catalogue.
        repos: Folders or Hub repositories, such as that of an adapter and that of its base.
        hub_kwargs: `revision`, `token`, `cache_dir`, ... as `from_pretrained` takes them.

    Raises:
        ValueError: Without a catalogue; and where there is no `collator_config.json`, of a model whose config has
            features or a pathway of positive feedback: what they are made of is written in no other file.
    """
    config, catalogue = model.config, model.catalogue
    if catalogue is None:
        raise ValueError(
            f"{type(model).__name__} has no catalogue, so there are no items to make batches of: set "
            "`model.catalogue`, or load the model from a folder that holds catalogue.safetensors."
        )
    tokens = catalogue.semantic_ids.cpu().numpy() + np.array(config.level_offsets)
    for repo in repos:
        found = cached_file(str(repo), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if found is not None:
            return OneRecCollator.from_pretrained(repo, tokens, **hub_kwargs)
    lengths = config.pathway_lengths if config.model_type == "onerec_v1" else {}
    if config.context_features or config.user_features or lengths.get("positive"):
        features = [*config.context_features, *config.user_features]
        what = f"the features {features}" if features else "a pathway of positive feedback"
        where = f"{' and '.join(map(str, repos))} holds" if repos else "there is"
        raise ValueError(
            f"{where} no {CONFIG_NAME}, and the model reads {what}: how they are made of a row is known to its "
            "collator alone. Write it beside the model with `collator.save_pretrained(folder)`; a trainer takes it as "
            "`data_collator=`."
        )
    if lengths:
        named = {f"{name}_length": length for name, length in lengths.items()}
        return PathwayCollator(tokens, lifelong="history", **named)
    return (SessionCollator if config.session_wise else OneRecCollator)(tokens)


__all__ = ["collator_of"]
