"""The catalogue for any transformers model whose vocabulary holds the codes: a logits processor, and a fast
`custom_generate`.

OpenOneRec's layout, a causal language model whose vocabulary was extended by semantic-ID tokens, is the case in mind.
Legend: B users, K beams, R rows, P prompt tokens, L levels, W largest fan-out of a level.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import LogitsProcessor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerationConfig

from .beam_search import BeamSearch, search
from .catalogue import Catalogue
from .input_checks import check_finite
from .modeling_layers import CACHE

_DEAD = float("-inf")


class CatalogueLogitsProcessor(LogitsProcessor):
    """
    The constraint for transformers' own decoding loops: beam search, sampling, encoder-decoder or decoder-only.

    Stateless and free of host syncs: the prefix of each row is walked down from its own tokens. It repairs what may be
    generated, not what transformers' loop costs (it repeats the context for every beam), and not its fillers: where
    fewer items than beams exist, that loop returns duplicates with scores near -1e9.

    Args:
        catalogue (`Catalogue`): The items that may be generated, on the model's device.
        level_offsets (`list[int]`): Token id of code 0 of each level.
        prompt_length (`int`): Tokens in front of the first code, BOS included; of an encoder-decoder, those of the
            decoder.
        allowed_items (`torch.BoolTensor` of shape (B, N), *optional*): Subset per request; rows of one request are
            adjacent.
        eos_token_id (`int`, *optional*): Allowed alone once the semantic ID is complete.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        level_offsets: Sequence[int],
        prompt_length: int = 1,
        allowed_items: torch.Tensor | list[torch.Tensor] | None = None,
        eos_token_id: int | None = None,
    ):
        self.catalogue, self.level_offsets, self.prompt_length = catalogue, list(level_offsets), prompt_length
        self.node_masks = (
            catalogue.node_masks(allowed_items) if isinstance(allowed_items, torch.Tensor) else allowed_items
        )
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        level = input_ids.shape[1] - self.prompt_length
        if level >= self.catalogue.num_levels:
            if self.eos_token_id is None:
                raise ValueError(
                    f"nothing may follow {self.catalogue.num_levels} codes: set max_new_tokens to that number."
                )
            only = torch.arange(scores.shape[1], device=scores.device) == self.eos_token_id
            return scores.masked_fill(~only, _DEAD)
        node = None
        for depth in range(level):
            code = input_ids[:, self.prompt_length + depth] - self.level_offsets[depth]
            node = self.catalogue.step(node, depth, code)
        valid = self.catalogue.valid_codes(node, level, None if self.node_masks is None else self.node_masks[level])
        start, rows = self.level_offsets[level], scores.shape[0]
        inside = slice(start, start + valid.shape[1])
        if rows % valid.shape[0]:
            raise ValueError(
                f"allowed_items has {valid.shape[0]} rows, the search {rows}: give one row per request, or one row "
                "for all."
            )
        if 1 < valid.shape[0] < rows:  # at the first level, one row per request
            valid = valid.repeat_interleave(rows // valid.shape[0], 0)
        result = torch.full_like(scores, _DEAD)
        result[:, inside] = scores[:, inside].masked_fill(~valid, _DEAD)
        return result


class NotFinite(LogitsProcessor):
    """
    Remembers whether any score was NaN, and puts 0 in its place, which sampling survives; [`check_finite`] asks once
    at the end.

    transformers' loops give items of such scores, or stop in a kernel, and asking at every step would wait for the
    device.
    """

    seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        bad = scores.isnan() | (scores == float("inf"))
        self.seen = bad.any() if self.seen is None else self.seen | bad.any()
        return scores.masked_fill(bad, 0.0)

    def check(self, what: str) -> None:
        """Raises `ValueError` where a score was NaN or inf."""
        if self.seen is not None:
            check_finite(torch.where(self.seen, torch.nan, 0.0), what)


class _TreeAttention:
    """
    Log-probabilities of the beams of B prompts by any causal language model that takes 4D masks and position ids.

    A prompt stays one row. The K beams of a step are K more positions of that row, which see the prompt and their own
    ancestors and nothing else; the cache is neither repeated nor reordered.
    """

    def __init__(self, model, input_ids, attention_mask, catalogue: Catalogue, level_offsets, normalize: str):
        self.model, self.input_ids, self.catalogue = model, input_ids, catalogue
        self.level_offsets, self.normalize = level_offsets, normalize
        self.prompt_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.cache = DynamicCache()
        # (B, K, positions behind the prompt)
        self.ancestors = torch.zeros(input_ids.shape[0], 1, 0, dtype=torch.bool, device=input_ids.device)

    def advance(self, level, code=None, parent=None):
        """As `SharedContext.advance`, with logits in place of hidden states: (B, K, vocabulary)."""
        batch, beams = self.input_ids.shape[0], 1 if code is None else code.shape[1]
        if code is None:
            inputs = {"input_ids": self.input_ids, "attention_mask": self.prompt_mask}
            inputs["position_ids"] = (self.prompt_mask.cumsum(1) - 1).clamp(min=0)
            if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
                inputs["logits_to_keep"] = 1
        else:
            rows = torch.arange(batch, device=code.device).unsqueeze(1)
            own = torch.eye(beams, dtype=torch.bool, device=code.device).expand(batch, -1, -1)
            above = self.ancestors[rows, parent.view(batch, -1) - rows * self.ancestors.shape[1]]
            self.ancestors = torch.cat([above, own], dim=2)
            visible = torch.cat([self.prompt_mask.bool().unsqueeze(1).expand(-1, beams, -1), self.ancestors], dim=2)
            mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=code.device)
            inputs = {"input_ids": code + self.level_offsets[level - 1]}
            inputs["attention_mask"] = mask.masked_fill(~visible, torch.finfo(mask.dtype).min).unsqueeze(1)
            inputs["position_ids"] = (self.prompt_mask.sum(1, keepdim=True) + level - 1).expand(-1, beams)
        return self.model(**inputs, use_cache=True, **{CACHE: self.cache}).logits[:, -beams:]

    def log_probs(self, hidden, level, node=None):
        """As `SharedContext.log_probs`."""
        logits = hidden.flatten(0, 1).float()
        start = self.level_offsets[level]
        inside = slice(start, start + self.catalogue.codebook_sizes[level])
        if self.normalize == "vocab":
            return logits.log_softmax(-1)[:, inside]  # faster than a logsumexp
        logits = logits[:, inside]
        if self.normalize == "valid":
            valid = self.catalogue.valid_codes(None if node is None else node.flatten(), level)
            logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
        return logits.log_softmax(-1)


def _check(model, generation_config, normalize):
    what = type(model).__name__
    windows = "sliding_attention" in (model.config.to_dict().get("layer_types") or ())
    if model.config.is_encoder_decoder or "position_ids" not in inspect.signature(model.forward).parameters or windows:
        raise ValueError(
            f"catalogue_generate cannot fold the beams of {what} into one row: that takes a decoder-only model with "
            "position_ids and full attention. Use CatalogueLogitsProcessor in generate(num_beams=...) for this model."
        )
    if "flash" in (model.config._attn_implementation or ""):
        raise ValueError(
            f"{what} runs flash attention, which takes no tree mask: load it with attn_implementation='sdpa'."
        )
    if normalize not in ("vocab", "level", "valid"):
        raise ValueError(f"normalize={normalize!r}: allowed are 'vocab', 'level' and 'valid'.")
    if max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) > 1:
        raise ValueError(
            "catalogue_generate: leave num_beams and num_return_sequences at 1 and give search_beams=K instead; "
            "transformers repeats the prompt for them before it calls a custom_generate."
        )


@torch.no_grad()
def catalogue_generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    catalogue: Catalogue,
    level_offsets: list[int],
    search_beams: int = 1,
    allowed_items: torch.Tensor | None = None,
    normalize: str = "vocab",
    **model_kwargs,
) -> torch.Tensor | GenerateBeamDecoderOnlyOutput:
    """
    Constrained beam search as `model.generate(..., custom_generate=catalogue_generate, catalogue=..., search_beams=K,
    ...)`.

    Takes every causal language model of transformers with `position_ids`, 4D masks and full attention: the prompt is
    read once and shared by all beams. Logits processors and sampling parameters are not looked at. Models of this
    package take it too, and run their own search with `num_beams = num_return_sequences = search_beams`.

    Args:
        input_ids (`torch.LongTensor` of shape (B, P)): Prompts, padded on the left. The rest of `generate`'s arguments
            matter as little as `max_new_tokens`, which transformers warns about where it is not given.
        catalogue (`Catalogue`): The items that may be generated, on the model's device.
        level_offsets (`list[int]`): Token id of code 0 of each level.
        search_beams (`int`, defaults to 1): K; all K are returned. `num_beams` and `num_return_sequences` stay 1,
            because transformers repeats the prompt for them before it calls a `custom_generate`.
        allowed_items (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Subset of the items, per request.
        normalize (`"vocab"`, `"level"` or `"valid"`, defaults to `"vocab"`): What a code's probability is normalised
            over: all logits (transformers' beam search), the codes of its level, or those that continue the prefix to
                an existing item.
            Models of this package follow their `score_normalization` instead.

    Returns:
        `torch.LongTensor` of shape (B * K, P + L), rows of pad tokens behind the prompt where fewer items exist; with
        `return_dict_in_generate` a `GenerateBeamDecoderOnlyOutput` with `sequences_scores` (as in `generate`).
    """
    _check(model, generation_config, normalize)
    decoder = _TreeAttention(model, input_ids, model_kwargs.get("attention_mask"), catalogue, level_offsets, normalize)
    found = search(decoder, BeamSearch(), catalogue, input_ids.shape[0], search_beams, allowed_items)
    check_finite(found.scores, "catalogue_generate")
    codes = found.semantic_ids[:, :, 0]  # (B, K, L)
    tokens = torch.stack([codes[:, :, level] + offset for level, offset in enumerate(level_offsets)], dim=2)
    tokens = tokens.masked_fill(codes < 0, generation_config.pad_token_id or 0)
    sequences = torch.cat([input_ids.repeat_interleave(search_beams, 0), tokens.flatten(0, 1)], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    length_penalty = 1.0 if generation_config.length_penalty is None else generation_config.length_penalty
    scores = found.scores.flatten() / catalogue.num_levels**length_penalty
    return GenerateBeamDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences), sequences_scores=scores)


__all__ = ["CatalogueLogitsProcessor", "NotFinite", "catalogue_generate"]
