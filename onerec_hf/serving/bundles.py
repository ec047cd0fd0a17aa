"""Bundles: a folder with a catalogue, its metadata and its codebooks, or with a whole model; and what is made of it.

A catalogue bundle holds `bundle.json` (fingerprints of the items and of the codebooks), `catalogue.safetensors`,
`items.jsonl`, `quantizer_config.json` and `quantizer.safetensors`. Codebooks are frozen: the weights of a model mean
nothing with others. A model bundle is a repository as `onerec sft` writes it.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..item_ranker import ItemRanker
from ..models.catalogue import Catalogue
from ..recommendation_files import METADATA_NAME, item_metadata, load_metadata, save_metadata
from ..recommender import Recommender
from ..semantic_ids import codebook_fingerprint as fingerprint_of
from ..semantic_ids import load_quantizer
from .schemas import Item

BUNDLE_NAME = "bundle.json"


def with_catalogue(recommender: Recommender, catalogue: Catalogue, metadata: dict | None = None) -> Recommender:
    """
    A recommender with the same weights and other items; the given one stays as it is.

    Items keep, by their id, what a re-ranker and item features know of them.

    Args:
        recommender: As its repository was loaded. One whose items were changed already no longer knows what left it.

    Raises:
        ValueError: For codes of other sizes, and for new items of a model that reads item features.
    """
    old = recommender.model.catalogue
    if catalogue.codebook_sizes != old.codebook_sizes:
        raise ValueError(
            f"the catalogue has codebook_sizes={catalogue.codebook_sizes}, the model {old.codebook_sizes}: take the "
            "catalogue of the model's codebooks."
        )
    model, collator = copy.copy(recommender.model), copy.copy(recommender.ranker.collator)
    model.catalogue = catalogue.to(model.device)
    places = old.index_of(catalogue.item_ids, "ignore")
    if collator.item_features and (places < 0).any():
        raise ValueError(
            f"the model reads item features {sorted(collator.item_features)}, which new items do not have here: "
            "publish a model bundle."
        )
    collator.item_features = {name: values[places] for name, values in collator.item_features.items()}
    tokens = catalogue.semantic_ids.cpu().numpy() + np.array(model.config.level_offsets)
    collator.item_token_ids = tokens.astype(np.int64)
    reranker = copy.copy(recommender.ranker.reranker)
    if reranker is not None:
        before = torch.arange(len(old)) if reranker.positions is None else reranker.positions
        own = torch.as_tensor(places)
        reranker.positions = torch.where(own >= 0, before[own.clamp(min=0)], -1)
    ranker = ItemRanker(model, collator, recommender.ranker.num_beams, reranker)
    return Recommender(ranker, recommender.metadata if metadata is None else metadata, recommender.quantizer)


def changed(origin: Recommender, recommender: Recommender, items: Sequence[Item], remove: Sequence) -> Recommender:
    """
    The recommender with items added, replaced and removed.

    Args:
        origin: As its repository was loaded: an item that left and comes back is known there.

    Raises:
        KeyError: Unknown ids in `remove`. ValueError: An id that is named twice, a new item without an embedding, and
            what `Recommender.add_items` refuses.
    """
    catalogue = recommender.model.catalogue
    named = [item.item_id for item in items] + list(remove)
    if len(set(named)) < len(named):
        raise ValueError("an item is named twice among `items` and `remove`: once is right.")
    places = catalogue.index_of([item.item_id for item in items], "ignore").tolist()
    if without := [item.item_id for item, place in zip(items, places) if item.embedding is None and place < 0]:
        raise ValueError(f"item {without[0]!r} is new and has no embedding, from which its semantic ID is made.")
    coded = [(item, place) for item, place in zip(items, places) if item.embedding is not None]
    widths = {len(item.embedding or ()) for item, _ in coded}
    if len(widths) > 1:
        raise ValueError(
            f"the embeddings have {sorted(widths)} numbers: all must be as wide as those of the codebooks."
        )
    own = with_catalogue(recommender, catalogue)  # to be changed in place
    if leaving := [*remove, *(item.item_id for item, place in coded if place >= 0)]:
        own.remove_items(leaving)
    if coded:
        counts = catalogue.popularity
        popularity = [0.0 if place < 0 or counts is None else float(counts[place]) for _, place in coded]
        embeddings = np.array([item.embedding for item, _ in coded], dtype=np.float32)
        own.add_items([item.item_id for item, _ in coded], embeddings, popularity=popularity)
    metadata = own.metadata | item_metadata({item.item_id: item.metadata for item in items})
    return with_catalogue(origin, own.model.catalogue, metadata)


def codebook_fingerprint(recommender: Recommender) -> str | None:
    """What tells codebooks apart: 16 hexadecimal digits; None without codebooks."""
    return None if recommender.quantizer is None else fingerprint_of(recommender.quantizer)


def save_bundle(recommender: Recommender, folder: str | os.PathLike) -> Path:
    """
    Writes the catalogue bundle of a recommender: whole, or not at all.

    Raises:
        FileExistsError: Where the folder is there: a bundle never changes.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: a bundle never changes, choose another name.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    catalogue = recommender.model.catalogue
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        catalogue.save_pretrained(partial)
        save_metadata(recommender.metadata, partial)
        if recommender.quantizer is not None:
            recommender.quantizer.save_pretrained(partial)
        about = {"fingerprint": catalogue.fingerprint(), "codebooks": codebook_fingerprint(recommender)}
        text = json.dumps(about | {"num_items": len(catalogue)}, indent=2)
        (partial / BUNDLE_NAME).write_text(text + "\n", encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def load_catalogue(recommender: Recommender, folder: Path) -> Recommender:
    """
    The recommender with the items of a catalogue bundle.

    Raises:
        OSError, ValueError: Saying which file is missing, damaged, or of other codebooks.
    """
    about = _about(folder)
    catalogue = Catalogue.from_pretrained(folder)
    if catalogue.fingerprint() != about.get("fingerprint"):
        raise ValueError(
            f"{BUNDLE_NAME} names the catalogue {about.get('fingerprint')}, the file holds {catalogue.fingerprint()}: "
            "they are not of one bundle. Write it again with `save_bundle`."
        )
    metadata = load_metadata(folder / METADATA_NAME) if (folder / METADATA_NAME).is_file() else {}
    own = with_catalogue(recommender, catalogue, metadata)
    if recommender.quantizer is not None:
        own.quantizer = load_quantizer(folder)
    theirs, ours = codebook_fingerprint(own), codebook_fingerprint(recommender)
    if {theirs, about.get("codebooks")} != {ours}:
        raise ValueError(f"the bundle has the codebooks {theirs}, the model was trained with {ours}: publish a model.")
    return own


def _about(folder: Path) -> dict[str, Any]:
    path = folder / BUNDLE_NAME
    if not path.is_file():
        raise ValueError(f"bundle {folder.name!r} has no {BUNDLE_NAME}: it is no catalogue bundle; `save_bundle` is.")
    about = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(about, dict):
        raise ValueError(f"{BUNDLE_NAME} of {folder.name!r} holds no mapping: write it again with `save_bundle`.")
    return about


def load_model(folder: Path, current: Recommender, keep_catalogue: bool) -> tuple[Recommender, Recommender]:
    """
    The recommender of a repository as it is, and with its own items or with those that are served now.

    Raises:
        OSError, ValueError: As `Recommender.from_pretrained`; and for other codebooks where the catalogue is kept.
    """
    device = current.model.device
    graphs = current.model.captured_search
    found = Recommender.from_pretrained(folder, current.ranker.num_beams, device, local_files_only=True)
    if graphs is not None:
        found.model.capture(batch_sizes=graphs.batch_sizes, context_lengths=graphs.context_lengths)
    if not keep_catalogue:
        return found, found
    theirs, ours = codebook_fingerprint(found), codebook_fingerprint(current)
    if theirs != ours or ours is None:
        raise ValueError(
            f"the model has the codebooks {theirs}, the current catalogue {ours}: it can be kept with the same ones "
            'alone. Swap with "catalogue": "own".'
        )
    return found, with_catalogue(found, current.model.catalogue, current.metadata)


def rehearse(recommender: Recommender) -> None:
    """Searches twice, so that what would fail for users fails before them, and what is built on first use is there."""
    ids = recommender.model.catalogue.item_ids[:5].tolist()
    recommender.recommend([[], ids], k=1)
    recommender.recommend([ids[:1]], k=1, exclude_seen=len(recommender.model.catalogue) > 1)


__all__ = [
    "changed",
    "codebook_fingerprint",
    "load_catalogue",
    "load_model",
    "rehearse",
    "save_bundle",
    "with_catalogue",
]
