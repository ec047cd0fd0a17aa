"""The catalogue that travels with a model, and `generate` constrained to it.

The papers decode with beam search (OneRec, section 4.1; OneRec-V2, section 5). Legend: B users, L levels, N items, K beams.
"""

import copy
import os

import torch
import torch.nn.functional as F
from transformers.generation import GenerateBeamDecoderOnlyOutput, LogitsProcessorList
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .beam_search import CatalogueLogitsProcessor, beam_search
from .catalogue import CATALOGUE_NAME, Catalogue
from .layers import ContextKV

logger = logging.get_logger(__name__)

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# what only transformers' own loop does; the fast search is not used when one of these is asked for
_OWN_LOOP_FLAGS = ("do_sample", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
_OWN_LOOP_ARGUMENTS = ("prefix_allowed_tokens_fn", "assistant_model", "streamer", "custom_generate", "past_key_values")


class CatalogueGenerationMixin:
    """
    Saving, loading and generating under a catalogue.

    The model gives: `context_input_names` (what `encode_context` takes), `encode_context`, `next_hidden`, `level_log_probs`.
    """

    catalogue: Catalogue | None = None
    num_items: int = 1  # per row of `generate`; a model of sessions sets it
    context_input_names = ("context_ids", "context_mask", "context_features", "user_features")

    def encode_context(self, **inputs):
        """Keys and values of the context, once per user; the inputs are those of `context_input_names`."""
        return self.model.encode_context(**inputs)

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

    def next_hidden(self, tokens: torch.LongTensor, context_kv: ContextKV, cache) -> torch.Tensor:
        """Last hidden state (R, D) after C more tokens (R, C) per row; `cache` grows by C positions."""
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
        num_items: int | None = None,
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
            num_items (`int`, *optional*, defaults to the model's `num_items`): m, different items per row: 1, or a session.
            kwargs: `context_ids` (B, T, L), `context_mask`, `context_features`, `user_features`, and everything that
                `GenerationMixin.generate` takes: `num_beams`, `num_return_sequences`, `return_dict_in_generate`, ...

        Returns:
            `torch.LongTensor` of shape (B * num_return_sequences, m * (1 + L)): BOS and codes of each item; rows of pad tokens
            behind the first BOS where fewer items exist. With `return_dict_in_generate=True` a `GenerateBeamDecoderOnlyOutput`
            with `sequences_scores` (summed log-probability / new tokens ** length_penalty, `-inf` on those rows).

        Raises:
            ValueError: Without a catalogue, with one of other codebook sizes, with `num_return_sequences > num_beams`, or for a
                session that the fast search cannot give.
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
        num_items = self.num_items if num_items is None else num_items
        if constrained and reason is None:
            return self._beam_generate(settings, context, catalogue, allowed_items, num_items)
        if num_items > 1:
            raise ValueError(
                f"num_items={num_items} with {reason or 'constrained=False'}: only the fast search generates sessions."
            )
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

    def _beam_generate(self, settings, context, catalogue, allowed_items, num_items):
        num_beams, returned = settings.num_beams or 1, settings.num_return_sequences or 1
        context_kv = context.pop("context_kv", None)
        if context_kv is None:
            context_kv = self.encode_context(**{name: context.pop(name, None) for name in self.context_input_names})
        context.pop("attention_mask", None)
        if context:
            raise ValueError(f"generate does not know these arguments: {sorted(context)}.")
        found = beam_search(self, catalogue, context_kv, num_beams, allowed_items, num_items)
        codes = found.semantic_ids[:, :returned]  # (B, returned, m, L)
        tokens = codes + torch.tensor(self.config.level_offsets, device=codes.device)
        tokens = F.pad(tokens, (1, 0), value=self.config.bos_token_id).flatten(2)  # [BOS s^1..s^L] m times
        dead = (codes[:, :, 0, :1] < 0).expand_as(tokens).clone()
        dead[:, :, 0] = False
        sequences = tokens.masked_fill(dead, self.config.pad_token_id).flatten(0, 1)
        if not settings.return_dict_in_generate:
            return sequences
        length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
        scores = found.scores[:, :returned].flatten() / (sequences.shape[1] - 1) ** length_penalty
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
        inputs = {name: model_kwargs.pop(name, None) for name in self.context_input_names}
        if model_kwargs.get("context_kv") is None:
            model_kwargs["context_kv"] = self.encode_context(**inputs)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )


__all__ = ["CatalogueGenerationMixin"]
