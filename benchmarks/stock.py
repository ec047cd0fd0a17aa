"""Models of transformers over [specials | codes], random weights; and T5 behind this package's search, with the weights it has."""

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

from onerec_hf import ContextKV, OneRecV2Config

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


class SharedT5:
    """What `beam_search` asks of a model, on the weights of a T5; scores normalise over the whole vocabulary, as T5's do."""

    def __init__(self, model: T5ForConditionalGeneration, codebook_sizes: list[int]):
        self.model, layers = model, model.config.num_decoder_layers
        self.config = OneRecV2Config(codebook_sizes=codebook_sizes, num_hidden_layers=layers)

    def encode_context(self, input_ids: torch.LongTensor) -> ContextKV:
        states = self.model.encoder(input_ids).last_hidden_state
        attention = [block.layer[1].EncDecAttention for block in self.model.decoder.block]
        keys, values = (
            tuple(self._heads(one, getattr(one, name)(states)) for one in attention) for name in ("k", "v")
        )
        return ContextKV(key_states=keys, value_states=values, mask=torch.ones_like(input_ids, dtype=torch.bool))

    @staticmethod
    def _heads(attention, states):
        return states.unflatten(2, (attention.n_heads, -1)).transpose(1, 2)

    def next_hidden(self, tokens, context_kv, cache):
        decoder, rows, length = self.model.decoder, *tokens.shape
        batch, past = len(context_kv.mask), cache.get_seq_length()
        states, bias = self.model.shared(tokens), None
        for i, (own, cross, feed_forward) in enumerate(block.layer for block in decoder.block):
            attention = own.SelfAttention
            normed = own.layer_norm(states)
            query, key, value = (self._heads(attention, p(normed)) for p in (attention.q, attention.k, attention.v))
            key, value = cache.update(key, value, i)
            bias = attention.compute_bias(length, past + length, past_seen_tokens=past) if i == 0 else bias
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
            states = states + attention.o(attended.transpose(1, 2).flatten(2))
            attention = cross.EncDecAttention  # beams folded into the query length
            query = self._heads(
                attention, attention.q(cross.layer_norm(states)).view(batch, rows // batch * length, -1)
            )
            attended = F.scaled_dot_product_attention(
                query, context_kv.key_states[i], context_kv.value_states[i], scale=1.0
            )
            states = states + attention.o(attended.transpose(1, 2).reshape(rows, length, -1))
            states = feed_forward(states)
        return decoder.final_layer_norm(states[:, -1])

    def level_log_probs(self, hidden, level, node=None, catalogue=None):
        start = self.config.level_offsets[level]
        log_probs = self.model.lm_head(hidden).log_softmax(
            -1
        )  # one pass; torch's logsumexp takes three times as long on a CPU
        return log_probs[:, start : start + self.config.codebook_sizes[level]]
