"""One table for what the models read and what they write (`tie_word_embeddings`; Technical Report, section 4.2.2)."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from onerec_hf import OneRecV1Config

from .numeric import assert_close
from .tiny import ARCHITECTURES, tiny_catalogue, tiny_context, tiny_model


def tables(model):
    context = model.model.context_processor
    codes = context.embedding.embed_codes if model.config.model_type == "onerec_v1" else model.lm_head
    return model.lm_head.weight, model.model.decoder.embed_tokens.weight, codes.weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_table_trains_and_comes_back_as_one(architecture, tmp_path):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture, tie_word_embeddings=True)
    assert len({id(table) for table in tables(model)}) == 1
    inputs = tiny_context(catalogue, model)
    targets = inputs["context_ids"][:1, :1].expand(3, -1, -1)
    model(target_ids=targets, **inputs).loss.backward()
    assert model.lm_head.weight.grad[targets.flatten()].abs().sum() > 0
    model.save_pretrained(tmp_path)
    for model_class in (type(model), type(model.model)):
        again, whole = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not whole["missing_keys"] and not whole["unexpected_keys"] - {"lm_head.weight"}
        if model_class is type(model):
            assert len({id(table) for table in tables(again)}) == 1
            again.catalogue = catalogue
            with torch.no_grad():
                assert_close(
                    again(target_ids=targets, **inputs).loss, model(target_ids=targets, **inputs).loss.detach()
                )
        elif architecture == "v1":
            assert again.context_processor.embedding.embed_codes.weight is again.decoder.embed_tokens.weight


def test_tables_are_apart_by_default():
    for architecture in ARCHITECTURES:
        head, tokens, _ = tables(tiny_model(architecture=architecture))
        assert head is not tokens


def test_one_table_has_one_width():
    assert OneRecV1Config(tie_word_embeddings=True).code_embed_dim == 1024
    with pytest.raises(StrictDataclassError, match="code_embed_dim=16"):
        OneRecV1Config(tie_word_embeddings=True, code_embed_dim=16)
