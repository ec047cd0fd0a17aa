"""The four architectures of loss_parity.py, with equally many parameters in their blocks and one way to call them."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel

from onerec_hf import Catalogue, OneRecConfig, OneRecForCausalLM, OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.models.modeling_layers import LevelHead
from onerec_hf.models.modeling_semantic_id import SemanticIdForCausalLM

WIDTH, BLOCKS, HEADS, CODE_WIDTH, CONTEXT = 64, 6, 4, 32, 20
BUDGET = BLOCKS * (6 * WIDTH**2 + 3 * WIDTH * 2 * WIDTH)  # of the lazy decoder: 6 d^2 of attention, d_ff = 2 d
NAMES = ("encoder-decoder 1:1", "encoder-decoder 1:2", "naive decoder-only", "lazy decoder-only")
LAZY = NAMES[-1]
# the lazy decoder is L_kv = 1, S_kv = 1, G_kv = all heads; each of these changes one thing, on the first data set
CHANGES = {
    "S_kv = 2": {"context_key_value_split": 2},
    "L_kv = 6": {"num_context_layers": 6},
    "G_kv = 1": {"num_context_key_value_heads": 1},
    "no bias over ages": {"context_position": "none"},
    "L_kv = 2": {"num_context_layers": 2},
    "G_kv = 2": {"num_context_key_value_heads": 2},
    # as many active weights as the feed-forward of width 2 d: two of eight experts of half that width, from block 3 on
    "8 experts, 2 active": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": WIDTH,
        "first_dense_layers": 2,
    },
    "item ids in": {},
    "codes and item ids in": {},
}


class ItemIds(nn.Module):
    """A vector for every item in place of those of its codes, as wide as they are together; or beside them, summed."""

    def __init__(self, catalogue: Catalogue, offsets: list[int], codes: nn.Embedding | None):
        super().__init__()
        self.catalogue, self.codes = catalogue, codes
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.table = nn.Embedding(catalogue.num_items + 1, len(offsets) * CODE_WIDTH, padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, context_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T, L), 0 is padding, to vectors (B, T, L, width of a code)."""
        real = context_ids[..., 0] > 0
        leaves = self.catalogue.leaves_of((context_ids - self.offsets)[real])
        items = real.long().masked_scatter(real, leaves.long() + 1)
        vectors = self.table(items).unflatten(2, (context_ids.shape[2], CODE_WIDTH))
        return vectors if self.codes is None else vectors + self.codes(context_ids)


class NaiveDecoder(nn.Module):
    """A plain causal language model: context items as one token each, then BOS and codes of every target. Our head and
    loss.
    """

    catalogue = None
    _require_catalogue = SemanticIdForCausalLM._require_catalogue
    level_log_probs = SemanticIdForCausalLM.level_log_probs
    level_distributions = SemanticIdForCausalLM.level_distributions
    code_log_probs = SemanticIdForCausalLM.code_log_probs

    def __init__(self, config: OneRecV2Config, intermediate_size: int):
        super().__init__()
        self.config, vocabulary = config, config.vocab_size
        self.embed_codes = nn.Embedding(vocabulary, CODE_WIDTH, padding_idx=0)
        self.item_proj = nn.Linear(config.num_levels * CODE_WIDTH, WIDTH, bias=False)
        shape = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
        self.decoder = LlamaModel(LlamaConfig(vocab_size=vocabulary, intermediate_size=intermediate_size, **shape))
        self.lm_head = LevelHead(WIDTH, vocabulary, bias=False)
        for module in (self.embed_codes, self.item_proj, self.lm_head):  # as transformers and our models start
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, context_ids, context_mask, target_ids, target_positions, causal_targets=True):
        """Log-probabilities (M, L) of the M real targets of a batch of `OneRecCollator`."""
        (batch, items, levels), count = context_ids.shape, target_ids.shape[1]
        tokens = F.pad(target_ids[..., :-1], (1, 0), value=1).flatten(1)  # BOS s1 .. of each
        items_in = self.item_proj(self.embed_codes(context_ids).flatten(2))
        states = torch.cat([items_in, self.decoder.embed_tokens(tokens)], dim=1)
        step = torch.arange(items + count * levels)
        target = (step - items).div(levels, rounding_mode="floor").clamp(min=-1)  # -1: the context
        own = (step[:, None] >= step) & (target[:, None] == target)  # causal, the context or one target
        seen = target_positions.repeat_interleave(levels, 1)  # (B, n * L), items that each token of a target sees
        seen = torch.cat([torch.zeros(batch, items, dtype=torch.long), seen], dim=1)
        allowed = own | ((step < items) & (step < seen.unsqueeze(2)))
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        position = torch.where(target == -1, step, seen + (step - items) % levels)
        inputs = {"inputs_embeds": states, "attention_mask": mask.unsqueeze(1), "position_ids": position}
        states = self.decoder(**inputs, use_cache=False).last_hidden_state[:, items:]
        real = target_ids[..., 0] > 0
        return self.code_log_probs(states.unflatten(1, (count, levels))[real], target_ids[real])


class LazyDecoder(OneRecV2ForCausalLM):
    """OneRec-V2, called as `NaiveDecoder` is."""

    def forward(self, target_ids, **batch):
        return super().forward(target_ids=target_ids, **batch).target_log_probs[target_ids[..., 0] > 0]


class EncoderDecoder(OneRecForCausalLM):
    """OneRec with sessions of one item, called as `NaiveDecoder` is: a row per target, in four parts of like
    length.
    """

    def forward(self, context_ids, context_mask, target_ids, target_positions, causal_targets=True):
        real = target_ids[..., 0] > 0
        row, length, target = real.nonzero()[:, 0], target_positions[real], target_ids[real]
        order, result = length.argsort(stable=True), []
        for part in order.chunk(4):
            longest = int(length[part].max())
            mask = torch.arange(longest) < length[part].unsqueeze(1)
            context = {"context_ids": context_ids[row[part], :longest], "context_mask": mask}
            result.append(super().forward(**context, target_ids=target[part].unsqueeze(1)).target_log_probs[:, 0])
        return torch.cat(result)[order.argsort()]


def feed_forward(attention: int) -> int:
    """Even width at which the feed-forwards and `attention` times d^2 parameters make the budget."""
    return 2 * round((BUDGET - attention * WIDTH**2) / (6 * WIDTH * BLOCKS))


def build(variant: str, catalogue: Catalogue) -> nn.Module:
    common = {"codebook_sizes": catalogue.codebook_sizes, "score_normalization": "valid", "hidden_size": WIDTH}
    common |= {"num_attention_heads": HEADS, "gated_mlp": True, "context_embed_dim": CODE_WIDTH}
    if variant == "naive decoder-only":
        model = NaiveDecoder(OneRecV2Config(**common), feed_forward(4 * BLOCKS))
    elif variant.startswith("encoder-decoder"):
        encoders = BLOCKS // (2 if variant.endswith("1:1") else 3)
        decoders = BLOCKS - encoders
        # 4 d^2 of attention in an encoder block, 8 d^2 in a decoder block with the keys and values of the context
        common |= {"intermediate_size": feed_forward(4 * encoders + 8 * decoders), "num_hidden_layers": decoders}
        common |= {"num_encoder_layers": encoders, "max_context_items": CONTEXT, "num_experts": 0}
        model = EncoderDecoder(OneRecConfig(**common, num_session_items=1, context_tokens="item"))
    else:
        common |= {"intermediate_size": 2 * WIDTH, "num_hidden_layers": BLOCKS}
        common["context_position"] = "bias"  # as when these numbers were taken
        model = LazyDecoder(OneRecV2Config(**common | CHANGES.get(variant, {})))
        if variant.endswith("item ids in"):
            context = model.model.context_processor
            codes = context.embed_codes if variant.startswith("codes") else None
            context.embed_codes = ItemIds(catalogue, model.config.level_offsets, codes)
    model.catalogue = catalogue
    return model


def block_parameters(model: nn.Module) -> int:
    """Those of the blocks, and of the keys and values that an encoder-decoder makes of its context."""
    inside = {"layers", "key_values"}
    return sum(weight.numel() for name, weight in model.named_parameters() if inside & set(name.split(".")))
