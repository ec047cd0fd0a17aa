"""HSTU (Zhai et al. 2024, arXiv:2402.17152): pointwise attention without a softmax, and a gate in place of a
feed-forward layer.

Shapes: **B** users, **T** positions of a history, **N** items, **D** width, **H** heads.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel

from .sasrec import SASRec


class HSTUConfig(PretrainedConfig):
    """Sizes of an [`HSTUModel`]; the names are those of [`HSTU`]."""

    model_type = "hstu_baseline"

    vocab_size: int = 1
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    max_position_embeddings: int = 50
    dropout: float = 0.2
    score_temperature: float | None = 0.05


class HSTUBlock(nn.Module):
    """One layer: U, V, Q, K = SiLU(f1(norm(X))); Y = f2(norm(A V) * U); X + Y.

    A = SiLU(Q K^T + relative position bias) / T_max at and before a position, 0 behind it. T_max is the model's
    `max_length`, a constant: what a position sees does not depend on how its batch is padded.
    """

    def __init__(self, config: HSTUConfig):
        super().__init__()
        self.heads, self.length = config.num_attention_heads, config.max_position_embeddings
        self.input_norm, self.output_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.input = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.position_bias = nn.Parameter(torch.zeros(self.length, self.heads))  # by distance, 0 = itself
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        gate, *parts = silu(self.input(self.input_norm(states))).chunk(4, dim=-1)
        value, query, key = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts
        )  # (B, H, T, D / H)
        place = torch.arange(states.shape[1], device=states.device)
        distance = place[:, None] - place  # (T, T)
        bias = self.position_bias[distance.clamp(min=0)].permute(2, 0, 1)  # (H, T, T)
        weights = silu(query @ key.transpose(-1, -2) + bias) / self.length
        mixed = (weights * (distance >= 0)) @ value
        mixed = mixed.transpose(1, 2).flatten(2)
        return states + self.output(self.dropout(self.output_norm(mixed) * gate))


class HSTUModel(PreTrainedModel):
    """Item embeddings and positions, then blocks."""

    config_class = HSTUConfig

    def __init__(self, config: HSTUConfig):
        super().__init__(config)
        self.items = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(HSTUBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Embedding, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The item table (N, D), which also scores."""
        return self.items

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Item indices (B, T), padded on the right, to hidden states (B, T, D)."""
        states = self.items(input_ids) * self.config.hidden_size**0.5
        states = self.dropout(states + self.positions.weight[: input_ids.shape[1]])
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class HSTU(SASRec):
    """HSTU over item indices, trained and scored as [`SASRec`]; `self.model` is an [`HSTUModel`].

    Different from the paper: histories of items alone, without actions, and no bias by time, because a row of the
    splits has no times; positions count from the first item that the model sees.

    Args:
        num_items (`int`): N, the size of the catalogue.
        hidden_size (`int`, defaults to 64): D.
        num_hidden_layers (`int`, defaults to 2): blocks.
        num_attention_heads (`int`, defaults to 1): H.
        max_length (`int`, defaults to 50): number of most recent history items the model sees.
        dropout (`float`, defaults to 0.2): on embeddings and in front of a block's output.
        temperature (`float`, *optional*, defaults to 0.05): see [`SASRec`].
        seed (`int`, defaults to 0): of the initial weights.
    """

    def __init__(
        self,
        num_items: int,
        *,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 1,
        max_length: int = 50,
        dropout: float = 0.2,
        temperature: float | None = 0.05,
        seed: int = 0,
    ):
        config = HSTUConfig(
            vocab_size=num_items,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            max_position_embeddings=max_length,
            dropout=dropout,
            score_temperature=temperature,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = HSTUModel(config).eval()
        self.training_log = []

    @classmethod
    def _load(cls, folder: str | Path) -> HSTUModel:
        return HSTUModel.from_pretrained(folder)

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids)
