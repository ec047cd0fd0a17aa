"""What every OneRec model has above its base model: one head over [specials | level 1 | ... | level L], log-probabilities that
normalise within a level, a catalogue that travels with the weights, and generation constrained to it.

Generation objective: OneRec-V2, section 2.2.4 (arXiv:2508.20900). Legend: B users, R = B * m rows (rows of one user adjacent),
L levels, V_l codes of level l, D width, N items, K beams.
"""

import copy
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.generation import GenerateBeamDecoderOnlyOutput, LogitsProcessorList
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .beam_search import CatalogueLogitsProcessor, beam_search
from .catalogue import CATALOGUE_NAME, Catalogue
from .layers import ContextKV

logger = logging.get_logger(__name__)

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_CONTEXT_INPUTS = ("context_ids", "context_mask", "context_features", "user_features")
# what only transformers' own loop does; the fast search is not used when one of these is asked for
_OWN_LOOP_FLAGS = ("do_sample", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
_OWN_LOOP_ARGUMENTS = ("prefix_allowed_tokens_fn", "assistant_model", "streamer", "custom_generate", "past_key_values")


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


class SemanticIdMixin:
    """Head, loss, catalogue and `generate` of a model whose `self.model` turns a context and codes into hidden states."""

    catalogue: Catalogue | None = None

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

    # ---- catalogue -----------------------------------------------------------------------------------------------------

    def _require_catalogue(self, catalogue: Catalogue | None = None) -> Catalogue:
        catalogue = catalogue if catalogue is not None else self.catalogue
        if catalogue is None:
            raise ValueError(
                f"{type(self).__name__} has no catalogue. Set `model.catalogue = Catalogue(semantic_ids, codebook_sizes, "
                "item_ids)`, pass `catalogue=...`, or, in `generate`, `constrained=False` for codes without a check."
            )
        if catalogue.codebook_sizes != self.config.codebook_sizes:
            raise ValueError(
                f"the catalogue has codebook_sizes={catalogue.codebook_sizes}, the model {self.config.codebook_sizes}: they "
                "come from different semantic IDs. Use the catalogue that the model was trained with."
            )
        return catalogue.to(self.lm_head.weight.device)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As `PreTrainedModel.save_pretrained`, plus `catalogue.safetensors`, and `auto_map` entries for every Auto class."""
        module, name = type(self).__module__.rsplit(".", 1)[-1], type(self).__name__
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModel": f"{module}.{name}",
            "AutoModelForCausalLM": f"{module}.{name}",
        }
        if self.catalogue is not None:
            self.catalogue.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; attaches the repository's catalogue when it holds one."""
        result = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}
        path = None
        if pretrained_model_name_or_path is not None:
            path = cached_file(
                str(pretrained_model_name_or_path),
                CATALOGUE_NAME,
                _raise_exceptions_for_missing_entries=False,
                **hub_kwargs,
            )
        if path is not None:
            model.catalogue = Catalogue.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
            model._require_catalogue()
        return result

    # ---- generation ----------------------------------------------------------------------------------------------------

    def next_hidden(self, tokens, context_kv: ContextKV, cache) -> torch.Tensor:
        """Hidden state (R, D) after one more token (R, 1) per row; `cache` grows by one position."""
        return self.model(tokens, context_kv=context_kv, past_key_values=cache, use_cache=True).last_hidden_state[
            :, -1
        ]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config=None,
        *,
        constrained: bool = True,
        catalogue: Catalogue | None = None,
        allowed_items: torch.BoolTensor | None = None,
        **kwargs,
    ):
        r"""
        Recommend: semantic IDs of existing items, best first.

        Beam search (any `num_beams`, `do_sample=False`) takes this package's own exact search, which reads the context once per
        user. Sampling, custom logits processors, stopping criteria, `output_scores` and the like take transformers' loop under
        the same constraint. Sampling parameters of a generation config (temperature, top_k, ...) never touch a beam search.

        Args:
            inputs (`torch.LongTensor` of shape (B, 1), *optional*): BOS tokens; may be left out.
            constrained (`bool`, defaults to `True`): Generate only items of the catalogue; `False` allows any codes.
            catalogue (`Catalogue`, *optional*): Instead of the model's own.
            allowed_items (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Items each user may get (stock, category,
                eligibility, not yet seen).
            kwargs: `context_ids` (B, T, L), `context_mask`, `context_features`, `user_features`, and everything that
                `GenerationMixin.generate` takes: `num_beams`, `num_return_sequences`, `return_dict_in_generate`, ...

        Returns:
            `torch.LongTensor` of shape (B * num_return_sequences, 1 + L): BOS and codes; rows of pad tokens behind BOS where
            fewer items exist. With `return_dict_in_generate=True` a `GenerateBeamDecoderOnlyOutput` with `sequences_scores`
            (summed log-probability / L ** length_penalty, `-inf` on those rows).

        Raises:
            ValueError: Without a catalogue, with one of other codebook sizes, or with `num_return_sequences > num_beams`.
        """
        inputs = kwargs.pop("input_ids", inputs)
        settings = copy.deepcopy(generation_config if generation_config is not None else self.generation_config)
        context = settings.update(**{name: value for name, value in kwargs.items() if value is not None})
        if not constrained and (catalogue is not None or allowed_items is not None):
            raise ValueError("constrained=False together with catalogue or allowed_items: leave out one side.")
        if constrained:
            catalogue = self._require_catalogue(catalogue)
            if allowed_items is not None:
                allowed_items = allowed_items.to(catalogue.device)
        reason = self._own_loop_reason(inputs, settings, context)
        if constrained and reason is None:
            return self._beam_generate(settings, context, catalogue, allowed_items)
        if constrained:
            logger.warning_once(
                f"generate: {reason} is not part of the fast search, transformers' own loop runs instead."
            )
        return self._own_loop(inputs, generation_config, catalogue if constrained else None, allowed_items, kwargs)

    def _own_loop_reason(self, inputs, settings, context) -> str | None:
        """Why transformers' own loop is needed, or None when the fast search does all that is asked."""
        for name in _OWN_LOOP_FLAGS:
            if getattr(settings, name, None):
                return f"{name}={getattr(settings, name)}"
        for name in (*_OWN_LOOP_ARGUMENTS, "logits_processor", "stopping_criteria"):
            if context.get(name) is not None and (not isinstance(context[name], list) or len(context[name])):
                return name
        if inputs is not None and inputs.shape[1] != 1:
            return f"a prompt of {inputs.shape[1]} tokens"
        return None

    def _beam_generate(self, settings, context, catalogue, allowed_items):
        num_beams, returned = settings.num_beams or 1, settings.num_return_sequences or 1
        context_kv = context.pop("context_kv", None)
        if context_kv is None:
            context_kv = self.model.encode_context(**{name: context.pop(name, None) for name in _CONTEXT_INPUTS})
        context.pop("attention_mask", None)
        if context:
            raise ValueError(f"generate does not know these arguments: {sorted(context)}.")
        found = beam_search(self, catalogue, context_kv, num_beams, allowed_items)
        tokens = found.semantic_ids + torch.tensor(self.config.level_offsets, device=found.semantic_ids.device)
        tokens = tokens.masked_fill(found.semantic_ids < 0, self.config.pad_token_id)[:, :returned].flatten(0, 1)
        sequences = F.pad(tokens, (1, 0), value=self.config.bos_token_id)
        if not settings.return_dict_in_generate:
            return sequences
        length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
        scores = found.scores[:, :returned].flatten() / catalogue.num_levels**length_penalty
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)

    def _own_loop(self, inputs, generation_config, catalogue, allowed_items, kwargs):
        if catalogue is not None:
            processor = CatalogueLogitsProcessor(
                catalogue, self.config.level_offsets, 1, allowed_items, self.config.eos_token_id
            )
            kwargs["logits_processor"] = LogitsProcessorList([processor, *(kwargs.get("logits_processor") or [])])
            if self.config.score_normalization == "valid":
                kwargs["renormalize_logits"] = True
        return super().generate(inputs, generation_config, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # The context is encoded once per user before transformers repeats tensors per beam or per sample.
        inputs = {name: model_kwargs.pop(name, None) for name in _CONTEXT_INPUTS}
        if model_kwargs.get("context_kv") is None:
            model_kwargs["context_kv"] = self.model.encode_context(**inputs)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def resize_token_embeddings(self, *args, **kwargs):
        """Refused: the vocabulary is the semantic IDs."""
        raise NotImplementedError(
            "the vocabulary of a OneRec model is its semantic IDs (codebook_sizes in the config); a token more would be no code of "
            "any item. New items get semantic IDs from the same codebooks and join the catalogue instead."
        )


__all__ = ["SemanticIdCausalLMOutput", "SemanticIdMixin"]
