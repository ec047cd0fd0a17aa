"""The folder that `onerec export` writes: graphs, index, settings, the search in NumPy; and whether they agree."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from .._version import __version__
from ..collators.histories import history_rows
from ..models.catalogue import Catalogue
from ..models.item_ids import is_text
from ..recommender import Recommender
from . import numpy_search
from .numpy_search import ExportedRecommender
from .steps import DecodeStep, EncodeStep, export_steps

TOLERANCE = 1e-4  # of a number, relative to the largest of its tensor: float32, added up in another order


def export_recommender(recommender: Recommender, folder: str | os.PathLike, onnx: bool = True) -> dict[str, Any]:
    """
    Writes the steps of a model, the index of its items, and the search in NumPy.

    Args:
        recommender: Its model in evaluation mode, float32, on the CPU.
        folder: Made if it does not exist.
        onnx: Whether ONNX files are written, too, and compared with the model on onnxruntime.

    Returns:
        What `export.json` holds. With `onnx`, `parity` has the largest differences that were found, relative to the
        largest number of each tensor, and how many items of the search in NumPy were compared.

    Raises:
        ValueError: For a model of another type or device. RuntimeError: Where the exported steps do not compute what
            the model computes; the folder then has no `export.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "export.json").unlink(missing_ok=True)
    model = recommender.model
    context = example_context(recommender, [5, 3, 0])
    export_steps(model, context, folder, onnx)
    save_file(index_tensors(model.catalogue, model.config.level_offsets), folder / "index.safetensors")
    shutil.copy(numpy_search.__file__, folder / "search.py")
    settings = export_settings(recommender, list(context))
    _write(folder, settings)
    if onnx:
        try:
            settings["parity"] = check_parity(recommender, folder)
        except BaseException:
            (folder / "export.json").unlink()
            raise
        _write(folder, settings)
    return settings


def _write(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "export.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def export_settings(recommender: Recommender, encode_inputs: list[str]) -> dict[str, Any]:
    """What a search must know beside the tensors, as `export.json` holds it."""
    model, collator = recommender.model, recommender.ranker.collator
    config = model.config
    ids_alone = encode_inputs == ["context_ids", "context_mask"] and config.model_type != "onerec_v1"
    return {
        "onerec_hf": __version__,
        "torch": torch.__version__,
        "model_type": config.model_type,
        "catalogue_fingerprint": model.catalogue.fingerprint(),
        "encode_inputs": encode_inputs,
        "max_history": collator.max_history if ids_alone else None,
        "codebook_sizes": config.codebook_sizes,
        "level_offsets": config.level_offsets,
        "bos_token_id": config.bos_token_id,
        "score_normalization": config.score_normalization,
        "num_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def index_tensors(catalogue: Catalogue, level_offsets: list[int]) -> dict[str, np.ndarray]:
    """The index as [`numpy_search.Index`] reads it."""
    tensors = {"item_order": catalogue.item_order.cpu().numpy()}
    for level, codes in enumerate(catalogue.codes):
        edges = torch.arange(len(codes) + 1, device=codes.device)
        tensors[f"codes_{level}"] = codes.cpu().numpy().astype(np.int32)
        tensors[f"first_child_{level}"] = catalogue.first_child(edges, level).cpu().numpy().astype(np.int32)
    tokens = catalogue.semantic_ids.cpu().numpy().astype(np.int32) + np.array(level_offsets, dtype=np.int32)
    tensors["item_tokens"] = tokens
    if is_text(catalogue.item_ids):
        encoded = [str(item).encode() for item in catalogue.item_ids.tolist()]
        tensors["item_id_ends"] = np.cumsum([len(item) for item in encoded])
        tensors["item_id_bytes"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    else:
        tensors["item_ids"] = catalogue.item_ids
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def example_context(recommender: Recommender, lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs of users with random histories of these lengths; event columns and user features are unknown."""
    catalogue, generator = recommender.model.catalogue, np.random.default_rng(seed)
    histories = [catalogue.item_ids[generator.integers(len(catalogue), size=length)].tolist() for length in lengths]
    collator = recommender.ranker.collator.for_users({}, len(lengths))
    return collator.context(history_rows(catalogue, collator, histories, {}))


@torch.no_grad()
def check_parity(recommender: Recommender, folder: str | os.PathLike, num_beams: int = 20) -> dict[str, Any]:
    """
    Compares an exported folder on onnxruntime with the model: each step, and the whole search.

    Raises:
        RuntimeError: Saying what differs, and by how much.
    """
    model, exported = recommender.model, ExportedRecommender(folder)
    config, worst, items = model.config, {"encode": 0.0, "decode": 0.0, "score": 0.0}, 0
    generator = torch.Generator().manual_seed(0)
    for lengths in ([1], [7, 2, 0, 12]):
        context = example_context(recommender, lengths, seed=len(lengths))
        inputs = {name: tensor.numpy() for name, tensor in context.items()}
        encoded = EncodeStep(model)(**context)
        found = exported.steps("encode", inputs)
        worst["encode"] = max(worst["encode"], *map(_difference, found.values(), encoded))
        for beams, length in ((1, 0), (3, 1), (2, config.num_levels - 1)):
            shape = (
                config.num_hidden_layers,
                len(lengths),
                beams,
                config.num_key_value_heads,
                length,
                config.head_dim,
            )
            past = [torch.randn(shape, generator=generator) for _ in range(2)]
            low, high = config.level_offsets[0], config.vocab_size
            tokens = torch.randint(low, high, (len(lengths), beams), generator=generator)
            values = (tokens, *encoded, *past)
            names = ("tokens", "keys", "values", "mask", "past_keys", "past_values")
            step = exported.steps("decode", {name: value.numpy() for name, value in zip(names, values)})
            worst["decode"] = max(worst["decode"], *map(_difference, step.values(), DecodeStep(model)(*values)))
        k = min(num_beams, model.catalogue.num_items)
        expected = model.recommend_items(k, num_beams=num_beams, **context)
        for row, ids, scores in zip(exported.search(inputs, k, num_beams), *expected):
            alive = int((scores > float("-inf")).sum())
            own = np.array([score for _, score in row])
            if len(row) != alive or not _same_ranking(row, model.catalogue.item_ids[ids[:alive]], scores[:alive]):
                raise RuntimeError(f"the search in NumPy found {row[:5]}, the model {ids[:5]} with {scores[:5]}.")
            worst["score"] = max(worst["score"], _difference(own, scores[:alive])) if alive else worst["score"]
            items += alive
    if max(worst.values()) > TOLERANCE:
        raise RuntimeError(
            f"the exported steps differ from the model by {worst}, relative to the largest number of a tensor; at "
            f"most {TOLERANCE} is rounding. Export with `--onnx false`, and report the versions of torch and "
            "onnxruntime."
        )
    return {"largest_relative_difference": worst, "items_compared": items}


def _difference(found: np.ndarray, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    wanted = expected.numpy().astype(np.float64)
    if found.shape != wanted.shape:
        raise RuntimeError(f"an exported step returned the shape {found.shape}, the model {wanted.shape}.")
    return float(np.abs(found - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-6))


def _same_ranking(row: list[tuple[Any, float]], ids: np.ndarray, scores: torch.Tensor) -> bool:
    """Whether items agree; those whose scores are equal but for rounding may change places."""
    expected = {item: float(score) for item, score in zip(np.atleast_1d(ids).tolist(), scores)}
    margin = TOLERANCE * max(1.0, float(scores.abs().max()) if len(scores) else 1.0)
    last = float(scores[-1]) if len(scores) else 0.0
    return all(abs(expected.get(item, last) - score) <= margin for item, score in row)


__all__ = ["check_parity", "example_context", "export_recommender", "export_settings", "index_tensors"]
