"""FDSA (Zhang et al., IJCAI 2019): self-attention over items and, beside it, over their attributes; two GPT-2 stacks.

Shapes: **B** users, **T** positions, **N** items, **A** attributes of an item, **D** width.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, GPT2PreTrainedModel

from .ranking import rank_items
from .softmax_loss import FullSoftmaxLoss
from .training import pad_next_items, pad_right, recent_items, train_baseline, windows


class FDSAModel(GPT2PreTrainedModel):
    """The two streams: `items`, a GPT-2 of item embeddings, and `features`, one of what an item's attributes say.

    An item's attributes become one vector by attention over their embeddings (the paper's vanilla attention, with one weight
    per attribute); the outputs of both streams are concatenated and mapped to D.
    """

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        feature_config = copy.deepcopy(config)
        feature_config.vocab_size = 1  # it reads `inputs_embeds`
        self.items = GPT2Model(config)
        self.features = GPT2Model(feature_config)
        # Attribute 0 is "none": the attention never looks at it.
        self.attributes = nn.Embedding(config.num_attributes + 1, config.n_embd)
        self.attribute_score = nn.Linear(config.n_embd, 1)
        self.fuse = nn.Linear(2 * config.n_embd, config.n_embd)
        self.item_attributes: torch.Tensor
        self.register_buffer(
            "item_attributes", torch.zeros(config.vocab_size, config.max_attributes, dtype=torch.long)
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Item indices (B, T), padded on the right, to hidden states (B, T, D)."""
        attributes = self.item_attributes[input_ids]  # (B, T, A)
        embeddings = self.attributes(attributes)
        none = (attributes == 0).unsqueeze(-1)
        # The lowest number, not -inf: an item without attributes weighs its pads alike, and they are zeroed below.
        weights = self.attribute_score(embeddings).masked_fill(none, torch.finfo(embeddings.dtype).min).softmax(2)
        features = (weights * embeddings.masked_fill(none, 0.0)).sum(2)  # (B, T, D)
        items = self.items(input_ids).last_hidden_state
        features = self.features(inputs_embeds=features).last_hidden_state
        return self.fuse(torch.cat([items, features], dim=-1))


class FDSA:
    """FDSA over item indices; `self.model` is an [`FDSAModel`].

    Different from the paper: a softmax over all items in place of binary cross-entropy with one negative (which makes it
    stronger), ReLU blocks as in our `SASRec`, positions count from the first item that the model sees.

    Args:
        attributes (list of N lists of `int`): attributes of every item, 0..M-1, e.g. of `attribute_codes`; empty: none known.
        hidden_size (`int`, defaults to 64): D.
        num_hidden_layers (`int`, defaults to 2): blocks per stream.
        num_attention_heads (`int`, defaults to 2): heads per block.
        intermediate_size (`int`, *optional*): width of the feed-forward layer; D if None.
        max_length (`int`, defaults to 50): number of most recent history items the model sees.
        dropout (`float`, defaults to 0.5): on embeddings and on the output of every sublayer.
        seed (`int`, defaults to 0): of the initial weights.
    """

    def __init__(
        self,
        attributes: Sequence[Sequence[int]],
        *,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int | None = None,
        max_length: int = 50,
        dropout: float = 0.5,
        seed: int = 0,
    ):
        table = pad_right([torch.as_tensor([*row], dtype=torch.long) + 1 for row in attributes], 0)  # (N, A)
        if table.shape[1] == 0 or table.min() < 0:
            raise ValueError("FDSA needs attributes: a list of integers from 0 for every item, not all of them empty.")
        config = GPT2Config(
            vocab_size=len(table),
            n_positions=max_length,
            n_embd=hidden_size,
            n_layer=num_hidden_layers,
            n_head=num_attention_heads,
            n_inner=intermediate_size or hidden_size,
            activation_function="relu",
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        # ours: GPT-2 ignores them, `save_pretrained` keeps them
        config.update({"num_attributes": int(table.max()), "max_attributes": table.shape[1]})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = FDSAModel(config).eval()
        self.model.item_attributes.copy_(table)
        self.training_log: list[dict[str, float]] = []

    @property
    def num_items(self) -> int:
        return self.model.config.vocab_size

    @property
    def max_length(self) -> int:
        return self.model.config.n_positions

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` (which holds the attributes of the items)."""
        self.model.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "FDSA":
        """Reads what `save_pretrained` wrote."""
        self = cls.__new__(cls)
        self.model = FDSAModel.from_pretrained(folder).eval()
        self.training_log = []
        return self

    def fit(
        self, histories: Iterable[Sequence[int]], *, validate: Callable[["FDSA"], float] | None = None, **training
    ) -> "FDSA":
        """Trains on every position of every history.

        Args:
            histories (iterable of lists of `int`): item indices in time order, e.g. `dataset["train"]["history"]`.
            validate: see `train_baseline`.
            training: `num_epochs`, `batch_size`, `learning_rate`, `patience`, `seed`, ... of `train_baseline`.
        """
        rows = [{"input_ids": window[:-1], "labels": window[1:]} for window in windows(histories, self.max_length + 1)]
        train_baseline(self, rows, pad_next_items, self._loss, validate=validate, **training)
        return self

    @torch.no_grad()
    def recommend(
        self,
        examples: dict[str, list],
        k: int,
        exclude_seen: bool = False,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """The k best of all items for each row of `examples["history"]`, `(B, k)`; ties and -1: see `rank_items`."""
        recent = recent_items(examples, self.max_length, "FDSA")
        lengths = torch.tensor([len(items) for items in recent])
        last = torch.empty(len(recent), self.model.config.n_embd, device=self.model.device)  # (B, D)
        for rows in lengths.argsort().split(64):  # similar lengths together: little padding
            hidden = self.model(pad_right([recent[row] for row in rows.tolist()], 0).to(last.device))
            last[rows] = hidden[torch.arange(len(rows)), lengths[rows] - 1]
        scores = last @ self.model.items.wte.weight.T
        return rank_items(scores, k, exclude=examples["history"] if exclude_seen else None, generator=generator)

    def _loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        position = batch["labels"] != -100
        hidden = self.model(batch["input_ids"])[position]
        return FullSoftmaxLoss.apply(hidden, self.model.items.wte.weight, batch["labels"][position]), len(hidden)


def attribute_codes(*columns: Sequence) -> list[list[int]]:
    """Attributes of N items, numbered from 0 over all columns, for [`FDSA`].

    Args:
        columns: N values each: a category, a list of categories, or None for unknown. Equal values of two columns are two
            attributes.
    """
    numbers: dict[tuple, int] = {}
    result = []
    for row in zip(*columns, strict=True):
        named = [
            (column, value)
            for column, values in enumerate(row)
            for value in (values if isinstance(values, (list, tuple, np.ndarray)) else [values])
            if value is not None and value != ""
        ]
        result.append([numbers.setdefault(name, len(numbers)) for name in dict.fromkeys(named)])
    return result
