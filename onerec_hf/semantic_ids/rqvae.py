"""RQ-VAE (TIGER, arXiv:2305.05065, section 3.1): residual quantisation in the latent space of an autoencoder.

The baseline of the OneRec Technical Report (arXiv:2506.13695, Table 11). N items, D their width, L levels, K codebook
size, Z latent width.
"""

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from .distances import Rows, row_blocks
from .embedding_files import EmbeddingFiles
from .kmeans import nearest_centroids
from .residual import CONFIG_NAME, WEIGHTS_NAME, ResidualKMeans

logger = logging.getLogger(__name__)


class RQVAE:
    """Residual-quantised autoencoder, with the calls of [`ResidualKMeans`].

    `z = encoder(x)`; `r_1 = z`, `s_l = argmin_k ||r_l - c_k^l||^2`, `r_{l+1} = r_l - c^l_{s_l}`; `x^ = decoder(sum of
    codes)`. Loss per item: `||x - x^||^2 + sum_l (||sg(r_l) - c_l||^2 + beta ||r_l - sg(c_l)||^2)`, straight-through
    to the encoder.

    Where TIGER leaves room: the codebooks start as residual k-means of the untrained encoder's latents; a code that no
    item of an epoch took is moved to the residual of a random item, in all epochs but the last quarter; items are
    centred and divided by one number, their root mean squared deviation, so that the loss is in proportion to the
    reconstruction error of the items as given.

    Args:
        num_levels (`int`, *optional*, defaults to 3), codebook_size (`int`, *optional*, defaults to 256): L and K.
        latent_dim (`int`, *optional*, defaults to 32): Z.
        hidden_sizes (sequence of `int`, *optional*, defaults to `(512, 256, 128)`): encoder layers between D and Z;
            the decoder mirrors them. ReLU between layers.
        beta (`float`, *optional*, defaults to 0.25): weight of the commitment.
        num_epochs (`int`, *optional*, defaults to 200): over all items. TIGER runs 20,000.
        batch_size (`int`, *optional*, defaults to 1024): items per step.
        learning_rate (`float`, *optional*, defaults to 1e-3): of AdamW, falling to 0 as a cosine. TIGER's Adagrad at
            .4 collapses on standardised inputs.
        reset_dead_codes (`bool`, *optional*, defaults to `True`): see above.
        seed (`int`, *optional*, defaults to 0): same seed, same data, same codes on the CPU.

    Attributes:
        network (`nn.Module`): encoder and decoder; `None` before `fit`.
        latent (`ResidualKMeans`): the quantiser of the latents, codebooks of shape (L, K, Z).
        train_codes (`torch.LongTensor` of shape (N, L)): codes of the training items, the same as `encode` gives them.
    """

    def __init__(
        self,
        num_levels: int = 3,
        codebook_size: int = 256,
        latent_dim: int = 32,
        hidden_sizes: Sequence[int] = (512, 256, 128),
        beta: float = 0.25,
        num_epochs: int = 200,
        batch_size: int = 1024,
        learning_rate: float = 1e-3,
        reset_dead_codes: bool = True,
        seed: int = 0,
    ):
        self.latent = ResidualKMeans(num_levels, codebook_size, balanced=False, seed=seed)
        for name, value in (("latent_dim", latent_dim), ("num_epochs", num_epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        self.latent_dim, self.hidden_sizes, self.beta = latent_dim, tuple(hidden_sizes), beta
        self.num_epochs, self.batch_size, self.learning_rate = num_epochs, batch_size, learning_rate
        self.reset_dead_codes, self.seed = reset_dead_codes, seed
        self.network: _Network | None = None
        self.embedding_mean: torch.Tensor | None = None  # as of `ResidualKMeans`
        self.train_codes: torch.Tensor | None = None

    @property
    def num_levels(self) -> int:
        return self.latent.num_levels

    @property
    def codebook_size(self) -> int:
        return self.latent.codebook_size

    def fit(self, item_embeddings: torch.Tensor | np.ndarray | EmbeddingFiles, progress: bool = True) -> "RQVAE":
        """Trains on all rows, on the device of `item_embeddings`: (N, D), any float type, finite, N at least K.

        Of `EmbeddingFiles` a batch is in memory at a time, and the latents (N, Z) of all items, from which the
        codebooks start.
        """
        items = self.latent.checked(item_embeddings)
        if isinstance(items, torch.Tensor):
            items = items.float()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = _Network(items.shape[1], self.hidden_sizes, self.latent_dim).to(items.device)
        self.network = network
        network.center.copy_(items.mean() if isinstance(items, EmbeddingFiles) else items.mean(0))
        network.scale.copy_(_deviation(items, network.center).clamp_min(1e-12))
        codebooks = nn.Parameter(self.latent.fit(self.encoder_outputs(items))._fitted())
        optimizer = torch.optim.AdamW([*network.parameters(), codebooks], self.learning_rate, weight_decay=0.0)
        steps = -(-len(items) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_epochs * steps)
        bar = tqdm(range(self.num_epochs), desc="RQ-VAE", unit="epoch", disable=not progress)
        for epoch in bar:
            used, total = torch.zeros(codebooks.shape[:2], dtype=torch.bool, device=items.device), 0.0
            for rows in torch.randperm(len(items), generator=generator).to(items.device).split(self.batch_size):
                loss, codes = self.loss(items[rows], codebooks)
                optimizer.zero_grad()
                (loss / len(rows)).backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                for level in range(self.num_levels):
                    used[level, codes[:, level]] = True
            bar.set_postfix(loss=f"{total / len(items):.4g}", dead=int((~used).sum()))
            if self.reset_dead_codes and epoch < 0.75 * self.num_epochs:
                self._reset(codebooks, ~used, items, optimizer, generator)
        self.latent.codebooks = codebooks.detach()
        self.train_codes = self.encode(items)
        return self

    def loss(self, items: torch.Tensor, codebooks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over items (B, D) of the loss above, on the scale of the standardised items, and their codes (B, L)."""
        network = self._fitted()
        target = (items - network.center) / network.scale
        latents = network.encoder(target)  # (B, Z)
        residual, quantised, codes, loss = latents, torch.zeros_like(latents), [], 0.0
        for centroids in codebooks:
            code = nearest_centroids(residual.detach(), centroids.detach())
            chosen = centroids[code]
            loss = loss + (residual.detach() - chosen).square().sum()
            loss = loss + self.beta * (residual - chosen.detach()).square().sum()
            residual, quantised = residual - chosen.detach(), quantised + chosen.detach()
            codes.append(code)
        straight_through = latents + (quantised - latents).detach()
        return loss + (network.decoder(straight_through) - target).square().sum(), torch.stack(codes, 1)

    @torch.no_grad()
    def _reset(self, codebooks, dead, items, optimizer, generator) -> None:
        """Moves every code of `dead` (L, K) to the residual of a random item at its level; the optimiser forgets
        it.
        """
        if not dead.any():
            return
        rows = torch.randint(len(items), (self.codebook_size,), generator=generator).to(items.device)
        residual = self.encoder_outputs(items[rows])
        for level, centroids in enumerate(codebooks):
            chosen = centroids[nearest_centroids(residual, centroids)]
            centroids[dead[level]] = residual[: int(dead[level].sum())]
            for value in optimizer.state[codebooks].values():
                if value.shape == codebooks.shape:
                    value[level][dead[level]] = 0.0
            residual = residual - chosen

    def fit_encode(self, item_embeddings: torch.Tensor | np.ndarray | EmbeddingFiles) -> torch.Tensor:
        """`fit`, then `train_codes` (N, L)."""
        self.fit(item_embeddings)
        assert self.train_codes is not None
        return self.train_codes

    @torch.no_grad()
    def encoder_outputs(self, item_embeddings: torch.Tensor | np.ndarray | EmbeddingFiles) -> torch.Tensor:
        """Latents (N, Z) of any items (N, D): the space that `latent` quantises."""
        network = self._fitted()
        items = self.latent.checked(item_embeddings, width=len(network.center))
        network.to(items.device)
        latents = torch.empty(len(items), self.latent_dim, device=items.device)
        for block in row_blocks(len(items), max(*items.shape[1:], *self.hidden_sizes, 1), items.device):
            latents[block] = network.encoder((items[block].float() - network.center) / network.scale)
        return latents

    def encode(self, item_embeddings: torch.Tensor | np.ndarray | EmbeddingFiles) -> torch.Tensor:
        """Codes (N, L) of any items (N, D), values in `[0, codebook_size)`."""
        return self.latent.encode(self.encoder_outputs(item_embeddings))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Reconstructed items (N, D), float32, from codes (N, L)."""
        network = self._fitted().to(codes.device)
        return network.decoder(self.latent.decode(codes)) * network.scale + network.center

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `quantizer_config.json` and `quantizer.safetensors`; the folder may be a model's folder."""
        network, folder = self._fitted(), Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "quantizer_type": "rqvae",
            "num_levels": self.num_levels,
            "codebook_size": self.codebook_size,
            "embedding_dim": len(network.center),
            "latent_dim": self.latent_dim,
            "hidden_sizes": list(self.hidden_sizes),
            "beta": self.beta,
            "num_epochs": self.num_epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "reset_dead_codes": self.reset_dead_codes,
            "seed": self.seed,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
        tensors |= {} if self.embedding_mean is None else {"embedding_mean": self.embedding_mean}
        save_file(tensors | {"codebooks": self.latent._fitted().cpu().contiguous()}, folder / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "RQVAE":
        """Reads what `save_pretrained` wrote into a local folder; the weights come on the CPU. A ValueError where the
        two files do not fit each other.
        """
        config = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
        if (kind := config.pop("quantizer_type")) != "rqvae":
            raise ValueError(
                f"{CONFIG_NAME} in {folder} describes a {kind} quantizer, not an RQ-VAE: `load_quantizer`."
            )
        width = config.pop("embedding_dim")
        quantizer = cls(**config)
        tensors = load_file(Path(folder) / WEIGHTS_NAME)
        quantizer.latent.codebooks = tensors.pop("codebooks")
        quantizer.embedding_mean = tensors.pop("embedding_mean", None)
        quantizer.network = _Network(width, quantizer.hidden_sizes, quantizer.latent_dim)
        expected = {name: tuple(weight.shape) for name, weight in quantizer.network.state_dict().items()}
        expected["codebooks"] = (quantizer.num_levels, quantizer.codebook_size, quantizer.latent_dim)
        found = {name: tuple(weight.shape) for name, weight in tensors.items()}
        found["codebooks"] = tuple(quantizer.latent.codebooks.shape)
        if unlike := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
            raise ValueError(
                f"{WEIGHTS_NAME} in {folder} has other tensors than {CONFIG_NAME} says: "
                f"{ {name: (found.get(name), expected.get(name)) for name in unlike} }, found and expected. The two "
                "files are not of one quantizer, save it again."
            )
        quantizer.network.load_state_dict(tensors)
        return quantizer

    def _fitted(self) -> "_Network":
        if self.network is None:
            raise RuntimeError("This RQVAE is not trained yet: call `fit`, or load one with `from_pretrained`.")
        return self.network


class _Network(nn.Module):
    center: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, hidden_sizes: tuple[int, ...], latent_dim: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        sizes = [width, *hidden_sizes, latent_dim]
        self.encoder, self.decoder = _mlp(sizes), _mlp(sizes[::-1])


def _deviation(items: Rows, center: torch.Tensor) -> torch.Tensor:
    """Root mean squared deviation of all numbers of items (N, D) from their center (D,)."""
    total = torch.zeros((), dtype=torch.float64, device=items.device)
    for block in row_blocks(len(items), items.shape[1], items.device):
        total += (items[block] - center).square().sum(dtype=torch.float64)
    return (total / (len(items) * items.shape[1])).sqrt()


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def load_quantizer(folder: str | os.PathLike) -> ResidualKMeans | RQVAE:
    """
    The quantizer that `save_pretrained` of either class wrote into a local folder.

    Args:
        folder: With `quantizer_config.json` and `quantizer.safetensors`: a model's, or `tokenizer` in a data folder.

    Returns:
        [`ResidualKMeans`] or [`RQVAE`], on the CPU.

    Raises:
        FileNotFoundError: A file is missing; a Hub repository must be downloaded first.
        ValueError: A file is cut off, the two files are not of one quantizer, or it is of a kind that this version
            does not know.
    """
    path = Path(folder) / CONFIG_NAME
    kinds: dict[str, type[ResidualKMeans] | type[RQVAE]]
    kinds = {"residual_kmeans": ResidualKMeans, "rqvae": RQVAE}
    if not path.is_file():
        return ResidualKMeans.from_pretrained(folder)  # says what is missing
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["quantizer_type"]
        if kind in kinds:
            return kinds[kind].from_pretrained(folder)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} or {WEIGHTS_NAME} beside it cannot be read ({error}): a file is cut off. Save or download it "
            "again."
        ) from error
    raise ValueError(f"{path} names the quantizer {kind!r}, known are {sorted(kinds)}. Update onerec_hf.")


def codebook_fingerprint(quantizer: ResidualKMeans | RQVAE) -> str:
    """What tells codebooks apart: 16 hexadecimal digits of all that turns an embedding into codes."""
    with tempfile.TemporaryDirectory() as folder:
        quantizer.save_pretrained(folder)
        tensors = load_file(Path(folder) / WEIGHTS_NAME)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()[:16]
