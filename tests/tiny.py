"""Tiny models and catalogues that the tests build in memory."""

import itertools

import torch

from onerec_hf import Catalogue, OneRecV2Config, OneRecV2ForCausalLM

SIZES = [8, 8, 8]


def tiny_catalogue(num_items: int = 65, num_collisions: int = 5, seed: int = 0) -> Catalogue:
    """`num_items` items over 8 x 8 x 8 codes; the last `num_collisions` repeat the semantic IDs of the first ones."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor(list(itertools.product(*(range(size) for size in SIZES))))
    codes = grid[torch.randperm(len(grid), generator=generator)[: num_items - num_collisions]]
    return Catalogue(torch.cat([codes, codes[:num_collisions]]), SIZES, item_ids=range(1000, 1000 + num_items))


def tiny_model(catalogue: Catalogue | None = None, seed: int = 0, **overrides) -> OneRecV2ForCausalLM:
    """A OneRec-V2 of a few thousand parameters with weights wide enough that its distributions are not flat."""
    config = {
        "codebook_sizes": SIZES,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "context_embed_dim": 8,
    }
    model = OneRecV2ForCausalLM(OneRecV2Config(**(config | overrides))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.catalogue = catalogue
    return model


def tiny_context(
    catalogue: Catalogue, model, batch: int = 3, length: int = 6, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Random histories; the second user's is shorter, the third user's is empty."""
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(catalogue.num_items, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, length // 2 :] = False
    mask[2] = False
    offsets = torch.tensor(model.config.level_offsets)
    ids = (catalogue.semantic_ids[history] + offsets) * mask.unsqueeze(-1)
    return {"context_ids": ids, "context_mask": mask}
