"""Models of transformers over [specials | codes], random weights."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

from onerec_hf import OneRecV2Config

BOS = 1


def make_t5(codebook_sizes: list[int], layers: int = 4, width: int = 256) -> T5ForConditionalGeneration:
    """Encoder-decoder of `layers` + `layers` layers with distributions that are not flat."""
    config = T5Config(
        vocab_size=OneRecV2Config(codebook_sizes=codebook_sizes).vocab_size,
        d_model=width,
        d_kv=64,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // 64,
        decoder_start_token_id=BOS,
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    model.generation_config.update(eos_token_id=None, decoder_start_token_id=BOS, pad_token_id=0)
    return model


def make_qwen3(codebook_sizes: list[int], layers: int = 4, width: int = 256) -> Qwen3ForCausalLM:
    """Decoder-only, the prompt is the context."""
    config = Qwen3Config(
        vocab_size=OneRecV2Config(codebook_sizes=codebook_sizes).vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model
