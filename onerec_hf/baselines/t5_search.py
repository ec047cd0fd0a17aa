"""The package's constrained search over the weights of a stock T5: each user is read once, whatever the number of
beams.

transformers' own loop repeats the encoder's output for every beam, projects it anew and runs a whole beam of copies in
the first step. Shapes: **B** users, **K** beams, **T** encoder tokens, **L** levels, **D** width, **V** codes of a
level.
"""

from typing import Any, cast

import torch
from torch.nn import ModuleList
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import DynamicCache, T5ForConditionalGeneration

from ..models.catalogue import Catalogue


class T5Beams:
    """The beams of B users in a T5 whose vocabulary holds the codes, for `models.beam_search.search`.

    Scores normalise over the whole vocabulary, as T5's do. The T5 is in evaluation mode.

    Args:
        model (`T5ForConditionalGeneration`): its weights are read, its `generate` is not used.
        catalogue (`Catalogue`): items that may be generated, on the model's device.
        level_offsets (`list[int]`): token id of code 0 of each level; the tokens of two levels do not overlap.
        states (`torch.Tensor` of shape (B, T, D)): what the encoder says.
        mask (`torch.Tensor` of shape (B, 1 or heads, 1, T)): of the attention to them: true on real tokens, or what is
            added.
    """

    def __init__(
        self,
        model: T5ForConditionalGeneration,
        catalogue: Catalogue,
        level_offsets: list[int],
        states: torch.Tensor,
        mask: torch.Tensor,
    ):
        self.model, self.catalogue, self.level_offsets, self.mask = model, catalogue, level_offsets, mask
        self.blocks: list[Any] = [block.layer for block in cast(ModuleList, model.decoder.block)]
        attention = [cross.EncDecAttention for _, cross, _ in self.blocks]
        self.cross = [(_heads(one, one.k(states)), _heads(one, one.v(states))) for one in attention]
        self.cache = DynamicCache()
        # what stands in front of the codes goes with the first level
        self.edges = [0, *sorted(set(level_offsets))[1:]]
        self.parts = model.lm_head.weight.tensor_split(self.edges[1:])

    def advance(
        self, level: int, code: torch.Tensor | None = None, parent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, K, D) in front of the codes of `level`; `code` (B, K) was chosen last, in row `parent` (B * K,)."""
        batch, start = len(self.mask), self.model.config.decoder_start_token_id
        if code is None or parent is None:
            tokens = torch.full((batch, 1), start, device=self.mask.device)
        else:
            self.cache.batch_select_indices(parent)
            tokens = (code + self.level_offsets[level - 1]).view(-1, 1)
        decoder, rows = self.model.decoder, len(tokens)
        states, bias = self.model.shared(tokens), None  # (B * K, 1, D)
        for i, (own, cross, feed_forward) in enumerate(self.blocks):
            attention = own.SelfAttention
            normed = own.layer_norm(states)
            query, key, value = (_heads(attention, p(normed)) for p in (attention.q, attention.k, attention.v))
            key, value = self.cache.update(key, value, i)
            bias = attention.compute_bias(1, level + 1, past_seen_tokens=level) if i == 0 else bias
            attended = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
            states = states + attention.o(attended.transpose(1, 2).flatten(2))
            attention = cross.EncDecAttention  # a user's beams are K queries of one row
            query = _heads(attention, attention.q(cross.layer_norm(states)).view(batch, rows // batch, -1))
            attended = scaled_dot_product_attention(query, *self.cross[i], attn_mask=self.mask, scale=1.0)
            states = states + attention.o(attended.transpose(1, 2).reshape(rows, 1, -1))
            states = feed_forward(states)
        return decoder.final_layer_norm(states[:, -1]).unflatten(0, (batch, -1))

    def log_probs(self, hidden: torch.Tensor, level: int, node: torch.Tensor | None = None) -> torch.Tensor:
        """(b * K, V) log-probabilities of the codes of `level` for some of the users."""
        config, start = self.model.config, self.level_offsets[level]
        hidden = hidden.flatten(0, 1)
        if config.scale_decoder_outputs:
            hidden = hidden * config.d_model**-0.5
        # one level's logits at a time: those of a whole vocabulary leave the cache, and get new memory in every call
        totals, own = [], hidden
        for first, weight in zip(self.edges, self.parts):
            logits = linear(hidden, weight)
            totals.append(logits.logsumexp(-1))
            if first <= start < first + len(weight):
                own = logits[:, start - first : start - first + self.catalogue.codebook_sizes[level]]
        return own - torch.stack(totals).logsumexp(0).unsqueeze(1)


def _heads(attention, states: torch.Tensor) -> torch.Tensor:
    return states.unflatten(2, (attention.n_heads, -1)).transpose(1, 2)
