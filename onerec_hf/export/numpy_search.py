"""Constrained beam search over exported steps in plain NumPy: the reference for other languages.

    python search.py --history 1003 1007 --k 5

`onerec export` copies this file beside the graphs. It needs numpy, safetensors and onnxruntime, nothing of the package
that trained the model. docs/export.md says what the files hold. Legend: B users, T items of a history, K beams, L
levels, W children of a node, N items.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

DEAD = -np.inf  # the score of a prefix that leads to no allowed item


class Index:
    """
    The items as a tree of codes: the nodes of a level are numbered in the order of their prefixes, so the children of
    a node are neighbours.

    Attributes:
        codes (`list[np.ndarray]`): Per level, the last code of each node.
        first_child (`list[np.ndarray]`): Per level, the first child of each node on the next level, and one end more.
            On the last level, whose nodes are semantic IDs, it is a place in `item_order`.
        item_order (`np.ndarray` of shape (N,)): Item indices by semantic ID, popular ones first in each.
        item_ids (`np.ndarray` of shape (N,)): The ids by which the outside knows the items: int64 or text.
        item_tokens (`np.ndarray` of shape (N, L)): Tokens of each item.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], num_levels: int):
        self.codes = [tensors[f"codes_{level}"] for level in range(num_levels)]
        self.first_child = [tensors[f"first_child_{level}"] for level in range(num_levels)]
        self.item_order, self.item_tokens = tensors["item_order"], tensors["item_tokens"]
        if "item_ids" in tensors:
            self.item_ids = tensors["item_ids"]
        else:
            raw, ends = tensors["item_id_bytes"].tobytes(), tensors["item_id_ends"].tolist()
            self.item_ids = np.array([raw[start:end].decode() for start, end in zip([0, *ends], ends)])

    def children(self, node: np.ndarray | None, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Children (B, K, W) on `level` of nodes (B, K) of the level above, and which of these places hold one; None
        is the root, whose children are all nodes of the first level.
        """
        if node is None:
            child = np.arange(len(self.codes[0]))[None, None]
            return child, np.ones(child.shape, dtype=bool)
        start, end = self.first_child[level - 1][node], self.first_child[level - 1][node + 1]
        child = start[..., None] + np.arange((end - start).max())
        return np.minimum(child, len(self.codes[level]) - 1), child < end[..., None]

    def node_masks(self, allowed: np.ndarray) -> list[np.ndarray]:
        """Per level, the nodes (B, nodes) below which there is an item that a user may get, of items (B, N)."""
        masks: list[np.ndarray] = []
        below = allowed[:, self.item_order]
        for first in reversed(self.first_child):
            count = np.pad(below.cumsum(axis=1), ((0, 0), (1, 0)))  # allowed ones in front of each place
            below = count[:, first[1:]] > count[:, first[:-1]]
            masks.insert(0, below)
        return masks


class ExportedRecommender:
    """
    Searches in a folder that `onerec export` wrote.

    Args:
        folder: With `export.json`, `index.safetensors`, `encode.onnx` and `decode.onnx`.
        steps (*optional*): What runs a step: called with its name and its inputs, returns its outputs. Default:
            onnxruntime on a CPU.
    """

    def __init__(self, folder: str | os.PathLike, steps: Any = None):
        self.settings = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "index.safetensors")
        self.index = Index(tensors, len(self.settings["codebook_sizes"]))
        self.steps = OnnxSteps(folder) if steps is None else steps

    def recommend(
        self,
        histories: Sequence[Sequence],
        k: int = 10,
        num_beams: int = 50,
        allowed: np.ndarray | None = None,
    ) -> list[list[tuple[Any, float]]]:
        """
        The `k` best items of each user, as (item id, natural log-probability), best first.

        Args:
            histories: Per user the ids of the items, oldest first.
            num_beams: Prefixes that survive each step; at least `k`.
            allowed (`np.ndarray` of shape (B, N) or (1, N), *optional*): Items each user may get, as booleans.

        Raises:
            KeyError: For ids that the export does not have. ValueError: For a model that reads more than item ids.
        """
        return self.search(self.context(histories), k, num_beams, allowed)

    def context(self, histories: Sequence[Sequence]) -> dict[str, np.ndarray]:
        """
        Inputs of the encode step, padded on the right: `context_ids` (B, T, L) and `context_mask` (B, T).

        Raises:
            KeyError, ValueError: As [`recommend`].
        """
        longest = self.settings["max_history"]
        if longest is None:
            raise ValueError(
                f"the model reads {self.settings['encode_inputs']}, and not the items of a history alone: make these "
                "tensors as the package's collator does, and call `search`."
            )
        place = {item: i for i, item in enumerate(self.index.item_ids.tolist())}
        rows = [[place[item] for item in history][-longest:] for history in histories]
        width = max(1, *map(len, rows))
        mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
        ids = np.zeros((*mask.shape, self.index.item_tokens.shape[1]), dtype=np.int64)
        ids[mask] = self.index.item_tokens[[item for row in rows for item in row]]
        return {"context_ids": ids, "context_mask": mask}

    def search(
        self, context: Mapping[str, np.ndarray], k: int, num_beams: int, allowed: np.ndarray | None = None
    ) -> list[list[tuple[Any, float]]]:
        """
        As [`recommend`], with the inputs of the encode step in place of histories: for models that read more than ids.

        Args:
            context: The tensors that `encode_inputs` in `export.json` names, as the collator makes them: `context_ids`
                (B, T, L) and, where the model reads such, `context_features` (B, T, F) and `user_features` (B, F_u),
                int64; `context_mask` (B, T), bool.
            k: Items per user.
            num_beams: Prefixes that survive each step; at least `k`.
            allowed (`np.ndarray` of shape (B, N) or (1, N), *optional*): Items each user may get, as booleans.

        Returns:
            Per user a list of at most `k` pairs (item id, natural log-probability), best first.

        Raises:
            ValueError: `k` below 1 or above `num_beams`.
        """
        if not 1 <= k <= num_beams:
            raise ValueError(f"k={k} with num_beams={num_beams}: at least 1, and at most num_beams.")
        leaves, scores = self.beam_search(context, num_beams, allowed)
        found = []
        for user in range(len(leaves)):
            row: list[tuple[Any, float]] = []
            for leaf, score in zip(leaves[user], scores[user]):
                if score == DEAD or len(row) == k:
                    break
                first, end = self.index.first_child[-1][leaf : leaf + 2]
                items = self.index.item_order[first:end]  # that share the semantic ID
                if allowed is not None:
                    items = items[allowed[user % len(allowed), items]]
                row += [(item, float(score)) for item in self.index.item_ids[items].tolist()]
            found.append(row[:k])
        return found

    def beam_search(
        self, context: Mapping[str, np.ndarray], num_beams: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        The best semantic IDs of each user: leaves (B, K) of the index and their log-probabilities (B, K), best first;
        [`DEAD`] where fewer are allowed.
        """
        settings, index = self.settings, self.index
        masks = None if allowed is None else index.node_masks(allowed)
        encoded = self.steps("encode", context)
        users = len(encoded["mask"])
        shape = (settings["num_layers"], users, 1, settings["num_key_value_heads"], 0, settings["head_dim"])
        past = {name: np.zeros(shape, dtype=np.float32) for name in ("past_keys", "past_values")}
        tokens = np.full((users, 1), settings["bos_token_id"], dtype=np.int64)
        scores, node = np.zeros((users, 1), dtype=np.float32), None
        for level, offset in enumerate(settings["level_offsets"]):
            found = self.steps("decode", {"tokens": tokens, **encoded, **past})
            logits = found["logits"][..., offset : offset + settings["codebook_sizes"][level]]
            child, real = index.children(node, level)  # (B, K, W); at the root B and K are 1
            code = np.broadcast_to(index.codes[level][child], (*tokens.shape, child.shape[2]))
            log_probs = np.take_along_axis(logits, code, axis=2)
            if settings["score_normalization"] == "valid":  # a softmax over the codes that lead to an item
                log_probs = log_softmax(np.where(real, log_probs, DEAD))
            else:  # over all codes of the level
                log_probs = log_probs - log_sum(logits)
            if masks is not None:
                rows = np.arange(users)[:, None, None] % len(masks[level])
                real = real & masks[level][rows, child]
            candidates = np.where(real, scores[..., None] + log_probs, DEAD).reshape(users, -1)
            best = np.argsort(-candidates, axis=1, kind="stable")[:, :num_beams]
            beam = best // child.shape[2]  # (B, new K), the beam that each one continues
            scores = np.take_along_axis(candidates, best, axis=1)
            node = np.take_along_axis(np.broadcast_to(child, code.shape).reshape(users, -1), best, axis=1)
            tokens = index.codes[level][node].astype(np.int64) + offset
            user = np.arange(users)[:, None]
            past = {name: found[f"next_{name[5:]}"][:, user, beam] for name in past}
        assert node is not None
        return node, scores


def log_sum(logits: np.ndarray) -> np.ndarray:
    """log(sum(exp(logits))) over the last axis, which stays."""
    top = logits.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; `-inf` stays what it is."""
    return logits - log_sum(logits)


class OnnxSteps:
    """Runs `encode.onnx` and `decode.onnx` with onnxruntime."""

    def __init__(self, folder: str | os.PathLike, providers: Sequence[str] = ("CPUExecutionProvider",)):
        import onnxruntime

        self.sessions = {
            name: onnxruntime.InferenceSession(str(Path(folder) / f"{name}.onnx"), providers=list(providers))
            for name in ("encode", "decode")
        }

    def __call__(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self.sessions[name]
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs))))


def main() -> None:
    """Prints item ids and scores of one user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=str(Path(__file__).parent), help="With the exported steps.")
    parser.add_argument("--history", nargs="*", default=[], help="Item ids, oldest first.")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--num_beams", type=int, default=50)
    args = parser.parse_args()
    recommender = ExportedRecommender(args.folder)
    kind = recommender.index.item_ids.dtype.type  # of numbers or of text
    history = [kind(item).item() for item in args.history]
    (found,) = recommender.recommend([history], args.k, max(args.k, args.num_beams))
    for item, score in found:
        sys.stdout.write(f"{item} {score:.4f}\n")


if __name__ == "__main__":
    main()

__all__ = ["ExportedRecommender", "Index", "OnnxSteps"]
