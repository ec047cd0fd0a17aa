"""The search as CUDA graphs: hundreds of small kernels become one launch, for fixed shapes.

A graph replays what was launched once, with the addresses that it had. So the inputs of a search are copied into
buffers of a few fixed sizes, and its results are copied out. What a graph cannot hold (a batch or a history above the
largest size) is searched as without graphs. Legend: B users, T context items, K beams, m items of a session.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from transformers.utils import logging

from .beam_search import BeamSearchOutput, beam_search
from .catalogue import Catalogue

logger = logging.get_logger(__name__)


def record(way: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
    """
    `way` as a CUDA graph, after three runs that let libraries choose their kernels.

    Args:
        way: Launches work of fixed shapes, and reads nothing back from the device.
        pool: Of `torch.cuda.graph_pool_handle`: memory that graphs share which never run at the same time.

    Returns:
        A function that replays the graph, and what `way` returned, which each replay fills anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            way()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = way()
    return graph.replay, result


@dataclass
class _Graph:
    """A recorded search, its buffers, and the catalogue whose tensors it reads."""

    catalogue: Catalogue
    context: dict[str, torch.Tensor]
    allowed: torch.Tensor | None
    replay: Callable[[], None]
    found: BeamSearchOutput


class CapturedSearch:
    """
    Searches of a model, each of its shapes recorded at its first use.

    Args:
        model: On a GPU, in evaluation mode. Weights may change in place; where they are moved, graphs are recorded
            anew.
        batch_sizes (`Sequence[int]`): B of the buffers. A batch takes the smallest that holds it, filled up with rows
            that are thrown away.
        context_lengths (`Sequence[int]`): T of the buffers, likewise; the rest is padding.
        max_graphs (`int`, defaults to 8): How many graphs are kept; the one that was used longest ago goes. They share
            their working memory, so that each costs little more than its buffers.
    """

    def __init__(
        self,
        model: Any,
        batch_sizes: Sequence[int] = (1, 4, 16, 64),
        context_lengths: Sequence[int] = (64, 256, 1024, 3000),
        max_graphs: int = 8,
    ):
        sizes = {"batch_sizes": batch_sizes, "context_lengths": context_lengths, "max_graphs": [max_graphs]}
        for name, given in sizes.items():
            if not given or min(given) < 1:
                raise ValueError(f"{name}={given}: whole numbers of at least 1.")
        self.model, self.max_graphs = model, max_graphs
        self.batch_sizes, self.context_lengths = sorted(batch_sizes), sorted(context_lengths)
        self.graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self.lock = Lock()
        self.pool: Any = None

    def __call__(
        self,
        catalogue: Catalogue,
        num_beams: Sequence[int],
        context: dict[str, torch.Tensor],
        allowed_items: torch.Tensor | None = None,
        num_session_items: int = 1,
    ) -> BeamSearchOutput | None:
        """
        As `encode_context` and [`beam_search`] one after the other; None where no buffer is large enough.

        Args:
            context: Inputs of `encode_context`, (B, T, ...) each, `user_features` (B, ...).
        """
        batch, length = context["context_ids"].shape[:2]
        sizes = next((n for n in self.batch_sizes if n >= batch), None)
        fixed = self.model.config.model_type == "onerec_v1"  # its pathways have their lengths
        lengths = length if fixed else next((n for n in self.context_lengths if n >= length), None)
        if allowed_items is not None and allowed_items.shape[0] not in (1, batch):
            return None  # the search says what is wrong
        if sizes is None or lengths is None:
            logger.warning_once(
                f"{batch} users with {length} items are more than the CUDA graphs hold, batch_sizes="
                f"{self.batch_sizes} and context_lengths={self.context_lengths}: such searches run without a graph."
            )
            return None
        context = {name: values for name, values in context.items() if values is not None}
        if context.get("context_mask") is None:
            context["context_mask"] = (context["context_ids"] != self.model.config.pad_token_id).any(2)  # as without
        shape = (sizes, lengths, tuple(num_beams), num_session_items, allowed_items is not None, *sorted(context))
        with self.lock:
            graph = self._graph((shape, self._weights()), catalogue, context, allowed_items)
            for name, values in context.items():
                buffer = graph.context[name]
                buffer.fill_(self.model.config.pad_token_id if name == "context_ids" else 0)
                buffer[tuple(map(slice, values.shape))] = values
            if graph.allowed is not None and allowed_items is not None:
                graph.allowed.fill_(True)
                graph.allowed[:batch] = allowed_items
            graph.replay()
            # the next replay writes over them
            found = {name: values[:batch].clone() for name, values in graph.found.items()}
        return BeamSearchOutput(**found)

    def _weights(self) -> tuple:
        """What changes when the weights move."""
        first = next(self.model.parameters())
        return first.data_ptr(), first.dtype

    def _graph(self, key: tuple, catalogue: Catalogue, context: dict, allowed: torch.Tensor | None) -> _Graph:
        """The graph of that shape, recorded where there is none that reads this catalogue and these weights."""
        for known, graph in list(self.graphs.items()):
            if graph.catalogue is not catalogue or known[1] != key[1]:
                del self.graphs[known]
        if key not in self.graphs:
            while len(self.graphs) >= self.max_graphs:
                self.graphs.popitem(last=False)
            self.graphs[key] = self._record(key[0], catalogue, context, allowed)
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def _record(self, shape: tuple, catalogue: Catalogue, context: dict, allowed: torch.Tensor | None) -> _Graph:
        batch, length, widths, items, *_ = shape
        buffers = {}
        for name, values in context.items():
            behind = values.shape[1:] if name == "user_features" else (length, *values.shape[2:])
            fill = self.model.config.pad_token_id if name == "context_ids" else 0
            buffers[name] = values.new_full((batch, *behind), fill)
        mask = None if allowed is None else allowed.new_ones(batch, allowed.shape[1])

        @torch.no_grad()
        def way() -> BeamSearchOutput:
            context_kv = self.model.encode_context(**buffers)
            return beam_search(self.model, catalogue, context_kv, list(widths), mask, items)

        if self.pool is None and catalogue.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        return _Graph(catalogue, buffers, mask, *record(way, self.pool))


__all__ = ["CapturedSearch", "record"]
