"""Tiny models and catalogues that the tests build in memory."""

import itertools

import torch

from onerec_hf import (
    Catalogue,
    OneRecConfig,
    OneRecForCausalLM,
    OneRecV1Config,
    OneRecV1ForCausalLM,
    OneRecV2Config,
    OneRecV2ForCausalLM,
)

SIZES = [8, 8, 8]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# name -> config class, model class, what differs from the sizes that all tiny models share
ARCHITECTURES = {
    "onerec": (OneRecConfig, OneRecForCausalLM, {**MOE, "num_encoder_layers": 2, "num_session_items": 3}),
    "v1": (
        OneRecV1Config,
        OneRecV1ForCausalLM,
        {
            **MOE,
            "num_encoder_layers": 2,
            "encoder_moe": True,
            "short_term_length": 2,
            "positive_length": 3,
            "lifelong_length": 4,
            "num_lifelong_queries": 2,
        },
    ),
    "v2": (OneRecV2Config, OneRecV2ForCausalLM, {}),
    "v2_moe": (OneRecV2Config, OneRecV2ForCausalLM, {**MOE, "context_key_value_split": 2, "num_context_layers": 2}),
}


def tiny_catalogue(num_items: int = 65, num_collisions: int = 5, seed: int = 0) -> Catalogue:
    """`num_items` items over 8 x 8 x 8 codes; the last `num_collisions` repeat the semantic IDs of the first ones."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor(list(itertools.product(*(range(size) for size in SIZES))))
    codes = grid[torch.randperm(len(grid), generator=generator)[: num_items - num_collisions]]
    return Catalogue(torch.cat([codes, codes[:num_collisions]]), SIZES, item_ids=range(1000, 1000 + num_items))


def tiny_model(catalogue: Catalogue | None = None, seed: int = 0, architecture: str = "v2", **overrides):
    """A model of a few thousand parameters with weights wide enough that its distributions are not flat."""
    config_class, model_class, own = ARCHITECTURES[architecture]
    config = {
        "codebook_sizes": SIZES,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "context_embed_dim": 8,
    }
    model = model_class(config_class(**(config | own | overrides))).eval()
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
    """Random histories; the second user's is shorter, the third user's is empty. OneRecV1 has the length of its
    pathways.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model.config, OneRecV1Config):
        length = sum(model.config.pathway_lengths.values())
    history = torch.randint(catalogue.num_items, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, length // 2 :] = False
    mask[2] = False
    offsets = torch.tensor(model.config.level_offsets)
    ids = (catalogue.semantic_ids[history] + offsets) * mask.unsqueeze(-1)
    return {"context_ids": ids, "context_mask": mask}
