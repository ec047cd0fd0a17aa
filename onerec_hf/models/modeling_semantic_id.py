"""What every OneRec model has above its base model: one head over [specials | level 1 | ... | level L], log-probabilities that
normalise within a level, a catalogue that travels with the weights, and generation constrained to it.

Generation objective: OneRec-V2, section 2.2.4 (arXiv:2508.20900). Legend: B users, R = B * m rows (rows of one user adjacent),
L levels, V_l codes of level l, D width, N items, K beams.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import ModelOutput

from .catalogue import Catalogue
from .generation_semantic_id import CatalogueGenerationMixin


@dataclass
class SemanticIdCausalLMOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape (1,)): Mean negative log-probability per code, in nats.
        logits (`torch.FloatTensor` of shape (R, C, vocab_size)): Scores of the next token; everything outside the level that
            comes next is the lowest finite number, so a softmax over the vocabulary is the softmax over the level.
        target_log_probs (`torch.FloatTensor` of shape (B, n, L)): Log-probability of each code of each target, in nats.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    target_log_probs: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


class SemanticIdMixin(CatalogueGenerationMixin):
    """Head, loss, catalogue and `generate` of a model whose `self.model` turns a context and codes into hidden states."""

    # ---- the one place where scores become log-probabilities -----------------------------------------------------------

    def level_log_probs(
        self, hidden_states, level: int, node=None, catalogue: Catalogue | None = None
    ) -> torch.Tensor:
        """
        Log-probabilities of the codes of one level (OneRec-V2, eq. of L_Gen): softmax over the level's codes, or, with
        `config.score_normalization="valid"`, over the codes that continue the prefix to an existing item.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, D)): Last hidden states at the position before the code.
            level (`int`): 0-based level.
            node (`torch.LongTensor` of shape (R,), *optional*): Catalogue node of each row's prefix; None at the first level.
            catalogue (`Catalogue`, *optional*): Read only under `"valid"`; defaults to the model's own.

        Returns:
            `torch.FloatTensor` of shape (R, V_level), float32, in nats.
        """
        start = self.config.level_offsets[level]
        weight = self.lm_head.weight[start : start + self.config.codebook_sizes[level]]
        logits = F.linear(hidden_states, weight).float()
        if self.config.score_normalization == "valid":
            codes, _, real = self._require_catalogue(catalogue).children(node, level)
            spare = torch.where(real, codes, logits.shape[1]).expand(len(logits), -1)
            valid = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(~valid.scatter_(1, spare, True)[:, :-1], torch.finfo(torch.float32).min)
        return logits.log_softmax(-1)

    def code_log_probs(self, hidden_states: torch.Tensor, token_ids: torch.LongTensor) -> torch.Tensor:
        """
        Log-probability of given codes: what the loss, preference losses, RL ratios and beam scores are made of.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, L, D)): Position l is the one before code l.
            token_ids (`torch.LongTensor` of shape (R, L)): Tokens of the codes; rows of pad tokens give meaningless numbers.

        Returns:
            `torch.FloatTensor` of shape (R, L), in nats.
        """
        result, node = [], None
        for level, offset in enumerate(self.config.level_offsets):
            code = (token_ids[:, level] - offset).clamp(min=0)
            log_probs = self.level_log_probs(hidden_states[:, level], level, node)
            result.append(log_probs.gather(1, code.unsqueeze(1)))
            if self.config.score_normalization == "valid" and level + 1 < self.config.num_levels:
                node = self._require_catalogue().step(node, level, code).clamp(min=0)
        return torch.cat(result, dim=1)

    def mask_logits_to_level(self, logits: torch.Tensor, levels: torch.LongTensor) -> torch.Tensor:
        """`logits` (R, C, vocab) with everything outside the level that each position predicts at the lowest finite number;
        a position behind the last level predicts `<|sid_end|>`. `levels` (1 or R, C)."""
        edges = torch.tensor([*self.config.level_offsets, self.config.vocab_size], device=logits.device)
        token = torch.arange(self.config.vocab_size, device=logits.device)
        end = levels >= self.config.num_levels
        low, high = (
            edges[levels.clamp(max=self.config.num_levels - 1)],
            edges[levels.clamp(max=self.config.num_levels - 1) + 1],
        )
        inside = (token >= low.unsqueeze(-1)) & (token < high.unsqueeze(-1))
        inside = torch.where(end.unsqueeze(-1), token == self.config.eos_token_id, inside)
        return logits.masked_fill(~inside, torch.finfo(logits.dtype).min)

    def resize_token_embeddings(self, *args, **kwargs):
        """Refused: the vocabulary is the semantic IDs."""
        raise NotImplementedError(
            "the vocabulary of a OneRec model is its semantic IDs (codebook_sizes in the config); a token more would be no code of "
            "any item. New items get semantic IDs from the same codebooks and join the catalogue instead."
        )


__all__ = ["SemanticIdCausalLMOutput", "SemanticIdMixin"]
