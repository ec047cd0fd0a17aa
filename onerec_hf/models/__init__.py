"""The models, their tokenizer, the catalogue and the search: what ships to the Hub. Needs torch and transformers
alone.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .beam_search import BeamSearchOutput, beam_search, sample_items
from .captured_search import CapturedSearch
from .catalogue import Catalogue
from .catalogue_generate import CatalogueLogitsProcessor, catalogue_generate
from .configuration_onerec import OneRecConfig, OneRecV1Config
from .configuration_onerec_v2 import OneRecV2Config
from .configuration_reward import OneRecPScoreConfig, OneRecSessionRewardConfig
from .modeling_attention import ContextKV
from .modeling_onerec import OneRecForCausalLM, OneRecModel
from .modeling_onerec_v1 import OneRecV1ForCausalLM, OneRecV1Model
from .modeling_onerec_v2 import OneRecV2ForCausalLM, OneRecV2Model
from .modeling_reward import OneRecPScoreModel, OneRecSessionRewardModel, RewardModelOutput
from .modeling_semantic_id import (
    RecommendedItems,
    SemanticIdCausalLMOutput,
    SemanticIdForCausalLM,
    SemanticIdPreTrainedModel,
)
from .moe import balance_experts
from .tokenization_semantic_id import SemanticIdTokenizer

_MODELS: list[tuple] = [
    (OneRecConfig, OneRecForCausalLM),
    (OneRecV1Config, OneRecV1ForCausalLM),
    (OneRecV2Config, OneRecV2ForCausalLM),
    (OneRecSessionRewardConfig, OneRecSessionRewardModel),
    (OneRecPScoreConfig, OneRecPScoreModel),
]
for _config, _model in _MODELS:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)  # AutoModel.from_pretrained(...).generate() works
    AutoTokenizer.register(_config, tokenizer_class=SemanticIdTokenizer, exist_ok=True)
    _generative = _model.__name__.endswith("ForCausalLM")
    if _generative:
        AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    # save_pretrained copies this folder's files and writes auto_map, so that repositories load without the package
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM" if _generative else "AutoModel")
SemanticIdTokenizer.register_for_auto_class()

__all__ = [
    "BeamSearchOutput",
    "CapturedSearch",
    "Catalogue",
    "CatalogueLogitsProcessor",
    "ContextKV",
    "OneRecConfig",
    "OneRecForCausalLM",
    "OneRecModel",
    "OneRecPScoreConfig",
    "OneRecPScoreModel",
    "OneRecSessionRewardConfig",
    "OneRecSessionRewardModel",
    "OneRecV1Config",
    "OneRecV1ForCausalLM",
    "OneRecV1Model",
    "OneRecV2Config",
    "OneRecV2ForCausalLM",
    "OneRecV2Model",
    "RecommendedItems",
    "RewardModelOutput",
    "SemanticIdCausalLMOutput",
    "SemanticIdForCausalLM",
    "SemanticIdPreTrainedModel",
    "SemanticIdTokenizer",
    "balance_experts",
    "beam_search",
    "catalogue_generate",
    "sample_items",
]
