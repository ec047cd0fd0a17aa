"""The one place where scores become log-probabilities: each code's, within its level.

OneRec-V2, equation of L_Gen (arXiv:2508.20900). Legend: R rows, C decoder tokens, L levels, V_l codes of level l, D width.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .catalogue import Catalogue
from .input_checks import check_codes
from .layers import LevelHead


class LevelProbabilityMixin:
    """Log-probabilities of a model with `config`, `lm_head` and, for `score_normalization="valid"`, a catalogue."""

    config: Any
    lm_head: LevelHead
    if TYPE_CHECKING:

        def _require_catalogue(self, catalogue: Catalogue | None = None) -> Catalogue: ...

    def level_log_probs(
        self,
        hidden_states: torch.Tensor,
        level: int,
        node: torch.Tensor | None = None,
        catalogue: Catalogue | None = None,
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
        logits = self.lm_head(hidden_states, slice(start, start + self.config.codebook_sizes[level])).float()
        if self.config.score_normalization == "valid":
            codes, _, real = self._require_catalogue(catalogue).children(node, level)
            spare = torch.where(real, codes, logits.shape[1]).expand(logits.shape[0], -1)
            valid = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(~valid.scatter_(1, spare, True)[:, :-1], torch.finfo(torch.float32).min)
        return logits.log_softmax(-1)

    def level_distributions(self, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        The walk over the levels of given codes: the log-probabilities of every code of a level, behind the codes before it.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, L, D)): Position l is the one before code l.
            token_ids (`torch.LongTensor` of shape (R, L)): Tokens of the codes; rows of pad tokens give meaningless numbers.

        Yields:
            `torch.FloatTensor` of shape (R, V_l) for each level l, in nats, one at a time: together they can be large.
        """
        node = None
        check_codes(self.config, "target", token_ids, (self.config.pad_token_id, -100))
        for level, offset in enumerate(self.config.level_offsets):
            yield self.level_log_probs(hidden_states[:, level], level, node)
            if self.config.score_normalization == "valid" and level + 1 < self.config.num_levels:
                code = (token_ids[:, level] - offset).clamp(min=0)
                node = self._require_catalogue().step(node, level, code).clamp(min=0)

    def code_log_probs(self, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Log-probability of given codes: what the loss, preference losses, RL ratios and beam scores are made of.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, L, D)): Position l is the one before code l.
            token_ids (`torch.LongTensor` of shape (R, L)): Tokens of the codes; rows of pad tokens give meaningless numbers.

        Returns:
            `torch.FloatTensor` of shape (R, L), in nats.
        """
        codes = token_ids - torch.tensor(self.config.level_offsets, device=token_ids.device)
        levels = zip(self.level_distributions(hidden_states, token_ids), codes.clamp(min=0).unbind(1))
        return torch.stack([log_probs.gather(1, code.unsqueeze(1))[:, 0] for log_probs, code in levels], dim=1)

    def row_log_probs(self, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        As `code_log_probs`, for whole rows: BOS and the codes of one item, and so on for every item of a session.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, C, D)): One position per token; the one of the last code may be missing.
            token_ids (`torch.LongTensor` of shape (R, items * (L + 1))): BOS and codes.

        Returns:
            `torch.FloatTensor` of shape (R, items, L), in nats: the codes' log-probabilities, never BOS's.
        """
        size = self.config.num_levels + 1
        if token_ids.shape[1] % size or (token_ids.shape[1] > size and not self.config.session_wise):
            rows = f"{size} columns, BOS and {size - 1} codes" + (
                ", for every item" if self.config.session_wise else ""
            )
            raise ValueError(f"rows have {token_ids.shape[1]} tokens: expected {rows}.")
        code = torch.arange(token_ids.shape[1] // size * (size - 1), device=token_ids.device)
        before_code = code + code // (size - 1)  # every position but each item's last; a mask would be read back
        hidden_states = hidden_states[:, before_code].reshape(-1, size - 1, hidden_states.shape[-1])
        codes = token_ids[:, before_code + 1].reshape(-1, size - 1)
        return self.code_log_probs(hidden_states, codes).view(token_ids.shape[0], -1, size - 1)

    def mask_logits_to_level(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """
        `logits` (R, C, vocab) with everything that cannot follow at the lowest finite number: position p of a row predicts level
        p mod (L + 1); behind the last level stands `<|sid_begin|>` of a session's next item, or `<|sid_end|>`.
        `positions` (1 or R, C).
        """
        levels = positions % (self.config.num_levels + 1)
        edges = torch.tensor([*self.config.level_offsets, self.config.vocab_size], device=logits.device)
        token = torch.arange(self.config.vocab_size, device=logits.device)
        low = edges[levels.clamp(max=self.config.num_levels - 1)]
        high = edges[levels.clamp(max=self.config.num_levels - 1) + 1]
        inside = (token >= low.unsqueeze(-1)) & (token < high.unsqueeze(-1))
        ends = (levels == self.config.num_levels).unsqueeze(-1)
        # without an end token, what follows the last item is the begin of one more
        follower = self.config.bos_token_id if self.config.eos_token_id is None else self.config.eos_token_id
        follower = torch.full_like(positions, follower)
        if self.config.session_wise:
            last = positions + 1 == self.config.num_session_items * (self.config.num_levels + 1)
            follower = torch.where(last, follower, self.config.bos_token_id)
        inside = torch.where(ends, token == follower.unsqueeze(-1), inside)
        return logits.masked_fill(~inside, torch.finfo(logits.dtype).min)


__all__ = ["LevelProbabilityMixin"]
