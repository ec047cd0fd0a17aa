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

from .sequence_model import SequenceModel
from .training import pad_next_items, pad_right, train_baseline, windows


class FDSAModel(GPT2PreTrainedModel):
    """The two streams: `items`, a GPT-2 of item embeddings, and `features`, one of what an item's attributes say.

    An item's attributes become one vector by attention over their embeddings (the paper's vanilla attention, with one
    weight per attribute); the outputs of both streams are concatenated and mapped to D.
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


class FDSA(SequenceModel):
    """FDSA over item indices; `self.model` is an [`FDSAModel`].

    Different from the paper: a softmax over all items in place of binary cross-entropy with one negative (which makes
    it stronger), ReLU blocks as in our `SASRec`, positions count from the first item that the model sees.

    Args:
        attributes (list of N lists of `int`): attributes of every item, 0..M-1, e.g. of `attribute_codes`; empty: none
            known.
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
        self.training_log = []

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
        train_baseline(self, rows, pad_next_items, self._softmax_loss, validate=validate, **training)
        return self

    @classmethod
    def _load(cls, folder: str | Path) -> FDSAModel:
        return FDSAModel.from_pretrained(folder)

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids)

    def _score_vectors(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, self.model.items.wte.weight


def attribute_codes(*columns: Sequence) -> list[list[int]]:
    """Attributes of N items, numbered from 0 over all columns, for [`FDSA`].

    Args:
        columns: N values each: a category, a list of categories, or None for unknown. Equal values of two columns are
            two attributes.
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
