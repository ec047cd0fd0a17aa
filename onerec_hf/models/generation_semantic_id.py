"""The catalogue that travels with a model, and `generate` constrained to it.

The papers decode with beam search (OneRec, section 4; OneRec-V2, section 4). Legend: B users, L levels, N items, K
beams.
"""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .beam_search import beam_search, sample_items
from .captured_search import CapturedSearch
from .catalogue import CATALOGUE_NAME, Catalogue
from .catalogue_generate import CatalogueLogitsProcessor, NotFinite, catalogue_generate
from .input_checks import check_finite, check_generate, check_rows_allowed
from .item_ids import allowed_mask, is_node_masks
from .parallel import unsharded_class
from .tokenization_semantic_id import SemanticIdTokenizer, saved_codebook_sizes

logger = logging.get_logger(__name__)

_PUSH_KWARGS = ("repo_id", "commit_message", "create_pr", "revision", "token", "private", "tags")
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# what only transformers' own loop does; the fast search is not used when one of these is asked for
_OWN_LOOP_FLAGS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_OWN_LOOP_ARGUMENTS = [
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "streamer",
    "custom_generate",
    "past_key_values",
    "cache",
]
_OWN_LOOP_ARGUMENTS += ["logits_processor", "stopping_criteria", "max_length", "max_time", "stop_strings"]
# what changes scores, with the values that change nothing
_SCORE_SETTINGS: dict[str, tuple] = dict.fromkeys(
    ("repetition_penalty", "top_p", "typical_p", "guidance_scale"), (None, 1.0)
)
_SCORE_SETTINGS |= dict.fromkeys(("top_k", "no_repeat_ngram_size", "min_p", "min_length", "min_new_tokens"), (None, 0))
_SCORE_SETTINGS |= dict.fromkeys(
    ("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "renormalize_logits"), (None, 0)
)
_SCORE_SETTINGS |= dict.fromkeys(
    ("top_h", "bad_words_ids", "sequence_bias", "suppress_tokens", "forced_eos_token_id"), (None,)
)
_SAMPLING_ONLY = ("top_p", "typical_p", "top_k", "min_p", "epsilon_cutoff", "eta_cutoff", "top_h")


if TYPE_CHECKING:

    class _Model(PreTrainedModel, GenerationMixin):
        """What the mixin is mixed into."""

        config: Any
        generation_config: GenerationConfig
        encode_context: Any
        _require_catalogue: Any
else:
    _Model = object


class CatalogueGenerationMixin(_Model):
    """
    Saving, loading and generating under a catalogue.

    The model gives: `context_input_names` (what `encode_context` takes), `encode_context`, `next_hidden`,
    `level_log_probs`, and `_require_catalogue`.
    """

    catalogue: Catalogue | None = None
    num_session_items: int = 1  # per row of `generate`; a model of sessions sets it
    context_input_names = ("context_ids", "context_mask", "context_features", "user_features")
    captured_search: CapturedSearch | None = None

    def capture(self, **sizes: Any) -> None:
        """
        From now on `recommend_items` records its searches as CUDA graphs and replays them; nothing else changes.

        Each shape is recorded at its first use, which takes as long as a few searches. On another device than a GPU
        there are no such graphs: a warning says so, and searches stay as they are.

        Args:
            sizes: `batch_sizes`, `context_lengths` and `max_graphs` of [`CapturedSearch`].
        """
        search = CapturedSearch(self, **sizes)
        if self.device.type == "cuda":
            self.captured_search = search
        else:
            logger.warning(
                f"capture: the model is on {self.device}, CUDA graphs are for GPUs. Searches stay as they are."
            )

    # ---- catalogue

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        As `PreTrainedModel.save_pretrained`, plus `catalogue.safetensors`, the tokenizer where the folder has none of
        these codebook sizes, and `auto_map` entries for every Auto class.
        """
        push = kwargs.pop("push_to_hub", False)  # transformers would leave out what it has not written itself
        hub = {name: kwargs.pop(name) for name in _PUSH_KWARGS if push and name in kwargs}
        with unsharded_class(self):
            module, name = type(self).__module__.rsplit(".", 1)[-1], type(self).__name__
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                "AutoModel": f"{module}.{name}",
                "AutoModelForCausalLM": f"{module}.{name}",
            }
            if self.catalogue is not None:
                self._require_catalogue().save_pretrained(save_directory)
            self.config.catalogue_fingerprint = None if self.catalogue is None else self.catalogue.fingerprint()
            super().save_pretrained(save_directory, *args, **kwargs)
        sizes = self.config.codebook_sizes
        if kwargs.get("is_main_process", True) and saved_codebook_sizes(save_directory) != sizes:
            SemanticIdTokenizer(codebook_sizes=sizes).save_pretrained(save_directory)
        if push:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args, **kwargs) -> Any:
        """As `PreTrainedModel.from_pretrained`; attaches the repository's catalogue when it holds one."""
        try:
            result = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights of {pretrained_model_name_or_path} cannot be read ({error}): a file is cut off or no "
                "safetensors file. Save or copy it again, or download it with `force_download=True`."
            ) from error
        model = result[0] if isinstance(result, tuple) else result
        hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}
        # what lies beside the model is read from the same commit; a token is kept only until the pipeline has read it
        model._hub_kwargs = {
            name: value for name, value in hub_kwargs.items() if name != "token" or kwargs.get("_from_pipeline")
        }
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
            own, trained = model._require_catalogue().fingerprint(), model.config.catalogue_fingerprint
            if trained not in (None, own):
                raise ValueError(
                    f"{path} has the fingerprint {own}, config.json says {trained}: other items, or other semantic "
                    "IDs, so the model's codes would mean other items. Put back the file that was saved with it; or, "
                    "where the exchange is meant, load with `catalogue_fingerprint=None` and save the model again."
                )
        return result

    # ---- generation

    @torch.no_grad()
    def generate(  # type: ignore[override]  # what text generation takes by position has no place here
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        constrained: bool = True,
        catalogue: Catalogue | None = None,
        allowed_items: Any = None,
        num_session_items: int | None = None,
        replacement: bool = True,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateBeamDecoderOnlyOutput:
        r"""
        Recommend: semantic IDs of existing items, best first; or draw them, with `do_sample=True`.

        Beam search and plain sampling take this package's own loop, which reads the context once per user. Custom
        logits processors, `output_scores`, top_p and the like take transformers' loop under the same constraint, and
        say so.

        A `generation_config` changes no beam search beyond its width: sampling parameters and penalties in it are not
        looked at (a `do_sample=True` in the model's own counts only where `num_beams` is 1). Penalties given in the
        call count.

        Args:
            inputs (`torch.LongTensor` of shape (B, 1), *optional*): BOS tokens; may be left out.
            constrained (`bool`, defaults to `True`): Generate only items of the catalogue; `False` allows any codes.
            catalogue (`Catalogue`, *optional*): Instead of the model's own.
            allowed_items (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Items each user may get (stock,
                category, eligibility, not yet seen); or a list of item ids, for all users or one each; or what
                `catalogue.node_masks` made of a mask, for a filter that many calls share.
            num_session_items (`int`, *optional*, defaults to the model's `num_session_items`): m, different items per
                row: 1, or a session.
            replacement (`bool`, defaults to `True`): With `do_sample=True`: whether the samples of a user may repeat
                each other; `False` draws `num_return_sequences` different ones ([`sample_items`] also returns their
                probabilities).
            generator (`torch.Generator`, *optional*): With `do_sample=True`; defaults to torch's global one.
            kwargs: `context_ids` (B, T, L), `context_mask`, `context_features`, `user_features`, and everything that
                `GenerationMixin.generate` takes: `num_beams`, `num_return_sequences`, `return_dict_in_generate`, ...
                `compile_config` compiles the search, encoding of the context excepted (a new one for each new shape).

        Returns:
            `torch.LongTensor` of shape (B * num_return_sequences, m * (1 + L)): BOS and codes of each item; rows of
            pad tokens behind the first BOS where fewer items exist. With `return_dict_in_generate=True` a
            `GenerateBeamDecoderOnlyOutput` with `sequences_scores` (summed log-probability / new tokens **
            length_penalty, `-inf` on those rows).

        Raises:
            ValueError: Without a catalogue, with one of other codebook sizes, with `num_return_sequences > num_beams`,
                or for a session, or different samples, that the fast search cannot give.
        """
        inputs = kwargs.pop("input_ids", inputs)
        if kwargs.get("custom_generate") is catalogue_generate:  # the same search by its other entry
            del kwargs["custom_generate"]
            kwargs["num_beams"] = kwargs["num_return_sequences"] = kwargs.pop("search_beams", 1)
        given = {name: value for name, value in kwargs.items() if value is not None}
        settings = copy.deepcopy(generation_config if generation_config is not None else self.generation_config)
        for (
            name,
            value,
        ) in self.generation_config.to_dict().items():  # as transformers: the model's own where nothing is given
            if getattr(settings, name, None) is None:
                setattr(settings, name, value)
        context = settings.update(**given)
        if generation_config is not None and generation_config.max_new_tokens is not None:
            given.setdefault("max_new_tokens", generation_config.max_new_tokens)
        if (settings.num_beams or 1) > 1 and generation_config is None and "do_sample" not in given:
            settings.do_sample = False
        num_session_items = self.num_session_items if num_session_items is None else num_session_items
        if not constrained and (catalogue is not None or allowed_items is not None):
            raise ValueError("constrained=False together with catalogue or allowed_items: leave out one side.")
        batch = check_generate(self.config, inputs, settings, context, num_session_items)
        if constrained:
            catalogue = self._require_catalogue(catalogue)
        if allowed_items is not None:
            if not is_node_masks(allowed_items):
                allowed_items = catalogue.node_masks(allowed_mask(catalogue, allowed_items))
            check_rows_allowed(allowed_items, batch, [len(codes) for codes in catalogue.codes])
        reason = (
            self._own_loop_reason(inputs, settings, given, num_session_items) if constrained else "constrained=False"
        )
        if reason is None:
            return self._fast_generate(
                settings, context, catalogue, allowed_items, num_session_items, replacement, generator
            )
        if num_session_items > 1 or not replacement or generator is not None:
            raise ValueError(
                f"num_session_items={num_session_items}, replacement={replacement}, generator={generator} together "
                f"with {reason}: only the fast search knows sessions, samples without replacement, and generators."
            )
        if constrained:
            logger.warning_once(
                f"generate: {reason} is not part of the fast search, transformers' own loop runs instead."
            )
        return self._own_loop(inputs, generation_config, settings, catalogue, allowed_items, kwargs)

    def _own_loop_reason(self, inputs, settings, given, num_session_items) -> str | None:
        """Why transformers' own loop is needed, or None when the fast search does all that is asked."""
        for name in _OWN_LOOP_FLAGS:
            if getattr(settings, name, None):
                return f"{name}={getattr(settings, name)}"
        for name in _OWN_LOOP_ARGUMENTS:
            if given.get(name) is not None and (not isinstance(given[name], list) or len(given[name])):
                return name
        for name, harmless in _SCORE_SETTINGS.items():
            value = getattr(settings, name, None) if settings.do_sample else given.get(name)
            if value not in harmless and (settings.do_sample or name not in _SAMPLING_ONLY):
                return f"{name}={value}"
        if settings.do_sample and (settings.num_beams or 1) > 1:
            return f"do_sample=True with num_beams={settings.num_beams}"
        length = num_session_items * (self.config.num_levels + 1) - 1
        if given.get("max_new_tokens", length) != length:
            return f"max_new_tokens={given['max_new_tokens']} (the codes are {length} tokens)"
        if inputs is not None and inputs.shape[1] != 1:
            return f"a prompt of {inputs.shape[1]} tokens"
        return None

    def _fast_generate(self, settings, context, catalogue, allowed_items, num_session_items, replacement, generator):
        returned, num_beams = settings.num_return_sequences or 1, settings.num_beams or 1
        if not settings.do_sample and (returned > num_beams or not replacement or generator is not None):
            raise ValueError(
                f"num_return_sequences={returned}, num_beams={num_beams}, replacement={replacement}, "
                f"generator={generator}: a beam search returns at most num_beams rows; replacement and generator are "
                "for do_sample=True."
            )
        context_kv = context.pop("context_kv", None)
        if context_kv is None:
            context_kv = self.encode_context(**{name: context.pop(name, None) for name in self.context_input_names})
        context.pop("attention_mask", None)
        if context:
            raise ValueError(f"generate does not know these arguments: {sorted(context)}.")
        if settings.do_sample:
            temperature = 1.0 if settings.temperature is None else settings.temperature
            drawing = (returned, replacement, temperature, generator)
            found = sample_items(self, catalogue, context_kv, *drawing, allowed_items, num_session_items)
        else:
            run = beam_search
            if settings.compile_config is not None:
                run = torch.compile(beam_search, **settings.compile_config.to_dict())
            found = run(self, catalogue, context_kv, num_beams, allowed_items, num_session_items)
        check_finite(found.scores, f"{type(self).__name__}.generate")
        codes = found.semantic_ids[:, :returned]  # (B, returned, m, L)
        tokens = torch.stack([codes[..., l] + offset for l, offset in enumerate(self.config.level_offsets)], dim=3)
        tokens = F.pad(tokens, (1, 0), value=self.config.bos_token_id).flatten(2)  # [BOS s^1..s^L] m times
        dead = (codes[:, :, 0, :1] < 0).expand_as(tokens).clone()
        dead[:, :, 0] = False
        sequences = tokens.masked_fill(dead, self.config.pad_token_id).flatten(0, 1)
        if not settings.return_dict_in_generate:
            return sequences
        length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
        scores = found.scores[:, :returned].flatten() / (sequences.shape[1] - 1) ** length_penalty
        return GenerateBeamDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences), sequences_scores=scores)

    def _own_loop(self, inputs, generation_config, settings, catalogue, allowed_items, kwargs):
        if settings.do_sample:  # transformers' default would cut to the 50 best
            kwargs.setdefault("top_k", settings.top_k or 0)
        else:  # what may leak from a generation_config
            leaks = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
            source = self.generation_config if generation_config is None else generation_config
            leaks = {name: value for name, value in leaks.items() if getattr(source, name) not in (None, value)}
            kwargs = leaks | kwargs
        finite = NotFinite()
        processors: list[LogitsProcessor] = [finite]
        if catalogue is not None:
            offsets = self.config.level_offsets
            processors.append(CatalogueLogitsProcessor(catalogue, offsets, 1, allowed_items, self.config.eos_token_id))
            if self.config.score_normalization == "valid":
                kwargs["renormalize_logits"] = True
        kwargs["logits_processor"] = LogitsProcessorList([*processors, *(kwargs.get("logits_processor") or [])])
        result = super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
        finite.check(f"{type(self).__name__}.generate")
        return result

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # The context is encoded once per user before transformers repeats tensors per beam or per sample.
        inputs = {name: model_kwargs.pop(name, None) for name in self.context_input_names}
        if model_kwargs.get("context_kv") is None:
            model_kwargs["context_kv"] = self.encode_context(**inputs)
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )


__all__ = ["CatalogueGenerationMixin"]
