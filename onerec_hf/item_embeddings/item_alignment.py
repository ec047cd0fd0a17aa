"""Item embeddings that know about behaviour: a projection trained on item pairs (OneRec Technical Report, section
2.1.1).

The report trains a QFormer over the tokens of a multimodal model; over one vector per item (a text embedding) that
comes down to the projection used here. Its caption loss, which keeps the content readable, is that of `captions.py`. N
items, D and Z widths, P pairs, B pairs of a batch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from transformers.utils import logging

from .captions import CaptionDecoder

logger = logging.get_logger(__name__)

CONFIG_NAME, WEIGHTS_NAME = "item_alignment.json", "item_alignment.safetensors"


def item_contrastive_loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """In-batch InfoNCE: `L_I2I = -(1/B) sum_i log(exp(s_ii / tau) / sum_j exp(s_ij / tau))`.

    Args:
        first, second (`torch.Tensor` of shape (B, Z)): the items of every pair; s_ij: cosine of `first[i]`,
            `second[j]`.
        temperature: tau. The report gives neither it nor the similarity.

    Returns:
        `torch.Tensor`: a scalar in nats.
    """
    logits = normalize(first, dim=-1) @ normalize(second, dim=-1).T / temperature  # (B, B)
    return cross_entropy(logits, torch.arange(len(first), device=first.device))


class ItemAlignment(nn.Module):
    """`z = W x + V gelu(U x)`: a projection of item embeddings, (N, D) to (N, Z), that brings items of a pair
    together.

    It is a function of the content alone: new items go through it without any behaviour of theirs.

    Args:
        embedding_dim (`int`): D.
        output_dim (`int`, defaults to 128): Z.
        hidden_size (`int`, defaults to 512): of the residual branch, which starts at zero.
        temperature (`float`, defaults to 0.1), seed (`int`, defaults to 0): of the loss; of weights, batches and
            dropout.
        dropout (`float`, defaults to 0.1): on the inputs.
    """

    center: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        embedding_dim: int,
        output_dim: int = 128,
        hidden_size: int = 512,
        temperature: float = 0.1,
        dropout: float = 0.1,
        seed: int = 0,
    ):
        super().__init__()
        self.settings: dict[str, Any] = {
            "embedding_dim": embedding_dim,
            "output_dim": output_dim,
            "hidden_size": hidden_size,
            "temperature": temperature,
            "dropout": dropout,
            "seed": seed,
        }
        self.register_buffer("center", torch.zeros(embedding_dim))
        self.register_buffer("scale", torch.ones(()))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.linear = nn.Linear(embedding_dim, output_dim, bias=False)
            self.up = nn.Linear(embedding_dim, hidden_size)
            self.down = nn.Linear(hidden_size, output_dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., D), float32 and as they are, to z (..., Z), whose length is not 1 (`embed` makes it 1). In
        training mode there is dropout on the inputs.
        """
        x = self.dropout((embeddings - self.center) / self.scale)
        return self.linear(x) + self.down(nn.functional.gelu(self.up(x)))

    def fit(
        self,
        embeddings: np.ndarray,
        pairs: np.ndarray,
        *,
        captions: CaptionDecoder | None = None,
        caption_weight: float = 1.0,
        caption_batch_size: int = 64,
        num_epochs: int = 3,
        batch_size: int = 512,
        learning_rate: float = 1e-3,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> "ItemAlignment":
        """Trains on pairs of items that belong together: `L_I2I + caption_weight * L_caption_gen`.

        Args:
            embeddings (`np.ndarray` of shape (N, D)): of the content.
            pairs (`np.ndarray` of shape (P, 2)): item indices, e.g. of `item_to_item_pairs` and `user_to_item_pairs`.
            captions: adds the caption loss, and is trained with the projection; its vectors are those of `embed`.
            caption_weight, caption_batch_size: of that loss; items per step, drawn from all that have a text, with
                pairs or without. The report gives neither.
            num_epochs, batch_size (pairs: the others of a batch are the negatives), learning_rate: of AdamW, falling
                as a cosine.
            device: default: `"cuda"` where there is one, otherwise `"cpu"`; projection and captions are on the CPU
                afterwards.

        Raises:
            ValueError: fewer than two pairs, pairs of items that have no embedding, captions of another number of
                items.
        """
        if len(pairs) < 2 or pairs.min() < 0 or pairs.max() >= len(embeddings):
            raise ValueError(
                f"fit needs at least two pairs of items 0..{len(embeddings) - 1}, got {len(pairs)}"
                + (f" with indices {int(pairs.min())}..{int(pairs.max())}." if len(pairs) else ".")
            )
        if captions is not None and len(captions.lengths) != len(embeddings):
            raise ValueError(
                f"captions of {len(captions.lengths)} items for embeddings of {len(embeddings)}: give one text per "
                "item."
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        modules = nn.ModuleList([self] if captions is None else [self, captions]).to(device)
        items, links = torch.as_tensor(embeddings, dtype=torch.float32, device=device), torch.as_tensor(pairs)
        self.center.copy_(items.mean(0))
        self.scale.copy_((items - self.center).square().mean().sqrt().clamp_min(1e-12))
        told = torch.empty(0) if captions is None else captions.lengths.nonzero()[:, 0].cpu()  # items with a text
        generator = torch.Generator().manual_seed(self.settings["seed"])
        weights = [weight for weight in modules.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=0.01)
        steps = num_epochs * -(-len(pairs) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.settings["seed"])
            for epoch in logging.tqdm(range(num_epochs), desc="item alignment", unit="epoch", disable=not progress):
                total = torch.zeros((), device=device)
                for rows in torch.randperm(len(pairs), generator=generator).split(batch_size):
                    first, second = (self(items[links[rows, side]]) for side in (0, 1))
                    loss = item_contrastive_loss(first, second, self.settings["temperature"])
                    if captions is not None:
                        drawn = told[torch.randint(len(told), (caption_batch_size,), generator=generator)]
                        loss = loss + caption_weight * captions(normalize(self(items[drawn]), dim=-1), drawn)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    total += loss.detach() * len(rows)
                logger.info(f"item alignment, epoch {epoch + 1}: {total / len(pairs):.4f} nats")
        modules.cpu().eval()
        return self

    @torch.no_grad()
    def embed(self, embeddings: np.ndarray) -> np.ndarray:
        """Aligned embeddings (N, Z), float32, of length 1: their squared distance is 2 - 2 cosine."""
        self.eval()
        return normalize(self(torch.as_tensor(embeddings, dtype=torch.float32)), dim=-1).numpy()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `item_alignment.json` and `item_alignment.safetensors`; the folder may be a model's."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, Path(folder) / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ItemAlignment":
        """Reads what `save_pretrained` wrote into a local folder."""
        self = cls(**json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8")))
        self.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME))
        return self.eval()
