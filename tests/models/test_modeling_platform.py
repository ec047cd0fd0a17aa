"""Every architecture on the platform around it: export, offloading, FSDP2, LoRA, and the rest of transformers' common
tests.

With test_modeling_common.py this covers what transformers asks of every model of its own. What does not apply, and
why:

* resizing embeddings, pruning heads: the vocabulary is the semantic IDs, refused with an error;
* tied weights: `lm_head` and `embed_tokens` are two matrices in the papers;
* flash attention, flex attention: refused, because transformers unpads queries by the mask of the keys, which is wrong
  for a padded context; attention kernels are reached through sdpa;
* left padding of `input_ids`: every row has the same length, BOS and codes; the context is what is padded, and is
tested;
* feed-forward chunking, problem types, image, audio and text sub-models, backbones: there are none;
* prompt lookup, assisted, contrastive and group beam decoding, chunked prefill: they shorten long generations, these
  are of three tokens; contrastive and group search have left transformers for hub repositories;
* `generate(inputs_embeds=...)`, continuing from a cache, quantised caches: a prompt is one BOS token and a cache three
positions;
* text-generation pipeline, chat templates: the input is a context of tensors, no text;
* `nn.DataParallel`, DeepSpeed stage 3 and several GPUs in one process: need GPUs that the tests do not have.
"""

import copy
import os
import re

import peft
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.export import Dim
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import onerec_hf.trainers  # noqa: F401  # registers the default target modules of LoRA
from onerec_hf import ContextKV

from ..numeric import assert_close, assert_gradients_close
from ..processes import run_processes
from ..tiny import ARCHITECTURES, tiny_catalogue, tiny_context, tiny_model
from .test_modeling_common import every_architecture, prepared, rows_of, targets_of
from .test_modeling_reward import SESSION
from .test_modeling_reward import tiny as tiny_reward


@pytest.fixture(scope="module")
def catalogue():
    return tiny_catalogue()


def meta(tensors: dict) -> dict:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


@every_architecture
def test_nothing_is_read_back(catalogue, architecture):
    """Tensors without data: a training step that asks for a value, which on a GPU is a synchronisation, fails."""
    model, context, targets = prepared(catalogue, architecture)
    model.catalogue = None
    model.set_experts_implementation("batched_mm")  # the loop over experts does ask
    model.to("meta").train()
    rows = rows_of(targets, model).to("meta")
    for inputs in ({"target_ids": targets.to("meta")}, {"input_ids": rows, "labels": rows}):
        model(**inputs, **meta(context)).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@every_architecture
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_to_the_context_can_be_fused(catalogue, architecture, autocast, monkeypatch):
    """What CUDA's fused attention asks of keys, values and mask; else it silently multiplies whole matrices in
    float32.
    """
    model, context, targets = prepared(catalogue, architecture)
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **kwargs):
        seen.append((key, value, attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kv = model.encode_context(**context)
        del seen[:]
        model(target_ids=targets, context_kv=kv)
    model.generate(**context, num_beams=4)
    masks = [states for states in seen if states[2] is not None and states[2].dtype != torch.bool]
    assert len(masks) >= 4 * model.config.num_hidden_layers
    for key, value, mask in masks:
        assert mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1])
        assert mask.dtype == key.dtype == value.dtype and key.stride(-1) == value.stride(-1) == 1
    # made once, in the type that the blocks compute in
    assert all(s.dtype == (torch.bfloat16 if autocast else torch.float32) for s in kv.key_states + kv.value_states)


# ---- inputs and outputs


@every_architecture
def test_tuples_embeddings_and_masks(catalogue, architecture):
    """`return_dict=False`, `inputs_embeds`, a 4D mask and given positions say the same as the plain call."""
    model, context, targets = prepared(catalogue, architecture)
    rows = rows_of(targets, model)
    expected = model(input_ids=rows, labels=rows, **context)
    loss, logits, *_ = model(input_ids=rows, labels=rows, **context, return_dict=False)
    assert_close(loss, expected.loss)
    assert_close(logits, expected.logits)
    embeds = model.get_input_embeddings()(rows)
    assert_close(model(inputs_embeds=embeds, labels=rows, **context).loss, expected.loss)
    length = rows.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(rows), 1, -1, -1)
    positions = torch.arange(length).expand(len(rows), -1)
    for extra in ({"attention_mask": causal}, {"position_ids": positions}, {"attention_mask": torch.ones_like(rows)}):
        out = model(input_ids=rows, labels=rows, **context, **extra)
        assert_close(out.loss, expected.loss)
        assert_close(out.logits, expected.logits)
    kept = model(input_ids=rows, logits_to_keep=1, **context)
    assert_close(kept.logits, expected.logits[:, -1:])


@every_architecture
def test_gradients_of_recorded_outputs(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    model.set_attn_implementation("eager")
    rows = rows_of(targets, model)
    out = model(input_ids=rows, labels=rows, output_hidden_states=True, output_attentions=True, **context)
    recorded = [out.hidden_states[0], out.attentions[0], out.cross_attentions[0]]
    for tensor in recorded:
        tensor.retain_grad()
    out.loss.backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in recorded)


@every_architecture
def test_recording_by_the_config(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    model.config.output_hidden_states = True
    assert len(model(input_ids=rows_of(targets, model), **context).hidden_states) == 5


# ---- loading


@every_architecture
def test_base_model_and_head_model_load_each_other(catalogue, architecture, tmp_path):
    model, context, targets = prepared(catalogue, architecture)
    model.save_pretrained(tmp_path / "head")
    model.base_model.save_pretrained(tmp_path / "base")
    base, info = type(model.model).from_pretrained(tmp_path / "head", output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"lm_head.weight"} and not info["missing_keys"]
    again, info = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and not info["unexpected_keys"]
    ids = rows_of(targets, model)
    expected = model.model(ids, **context).last_hidden_state
    assert_close(base(ids, **context).last_hidden_state, expected)
    assert_close(again.model(ids, **context).last_hidden_state, expected)


@every_architecture
def test_other_shapes_are_reported(architecture, tmp_path):
    tiny_model(architecture=architecture).save_pretrained(tmp_path)
    config = tiny_model(architecture=architecture, codebook_sizes=[8, 8, 9]).config
    model_class = ARCHITECTURES[architecture][1]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model_class.from_pretrained(tmp_path, config=config)
    model, info = model_class.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    tables = {name for name, weight in model.named_parameters() if len(weight) == config.vocab_size}
    assert {name for name, *_ in info["mismatched_keys"]} == tables and len(tables) == 3


@every_architecture
def test_arguments_of_from_pretrained(catalogue, architecture, tmp_path):
    model, _, _ = prepared(catalogue, architecture)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16  # what config.json says
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)):
        assert AutoModel.from_pretrained(tmp_path, dtype=dtype).dtype == expected
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == eager.model.config._attn_implementation == "eager"
    for refused in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="does not support"):
            AutoModel.from_pretrained(tmp_path, attn_implementation=refused)
    with pytest.raises(ValueError, match="use_kernels=True would do nothing: the Hub has no kernel"):
        AutoModel.from_pretrained(tmp_path, use_kernels=True)


@every_architecture
def test_an_attention_of_ones_own(catalogue, architecture, tmp_path):
    """Registered under a name, it computes every attention of the model, and gets the masks that it asks for."""
    model, context, targets = prepared(catalogue, architecture)
    model.save_pretrained(tmp_path)
    called = set()

    def attend(module, *args, **kwargs):
        called.add(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("mine", attend)
    AttentionMaskInterface.register("mine", sdpa_mask)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="mine")
    with torch.no_grad():
        found = again(target_ids=targets, **context).target_log_probs
        assert_close(found, model(target_ids=targets, **context).target_log_probs)
    assert called == {type(m).__name__ for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "q_proj")}
    assert torch.equal(again.generate(**context, num_beams=4), model.generate(**context, num_beams=4))


@every_architecture
@pytest.mark.parametrize("everything", [False, True], ids=["part", "all"])
def test_offloading_to_disk(catalogue, architecture, everything, tmp_path):
    """Weights that lie on disk until their module runs give the same loss and the same items."""
    model, context, targets = prepared(catalogue, architecture)
    model.save_pretrained(tmp_path)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    again = AutoModel.from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={"cpu": size // 20 if everything else size * 9 // 10},
        offload_folder=tmp_path / "offload",
    )
    away = [weight.device.type == "meta" for weight in again.parameters()]
    assert all(away) if everything else any(away) and not all(away)
    with torch.no_grad():
        found = again(target_ids=targets, **context).target_log_probs
        assert_close(found, model(target_ids=targets, **context).target_log_probs)
    assert torch.equal(again.generate(**context, num_beams=4), model.generate(**context, num_beams=4))


@every_architecture
def test_copies(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    expected = model(target_ids=targets, **context).loss
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_close(model(target_ids=targets, **context).loss, expected)
    assert torch.equal(other.catalogue.semantic_ids, catalogue.semantic_ids)


def test_number_of_parameters():
    """By hand, V2: 4 blocks of cross- and self-attention, gated feed-forward and three norms; tables, context,
    head.
    """
    d, ff, vocab, dim = 32, 48, 28, 8
    block = 6 * d * d + 3 * d * ff + 3 * d
    context = vocab * dim + 3 * dim * d + d + d  # codes, item map, static slot, norm of the one key set
    expected = 4 * block + 2 * vocab * d + context + 3 * d  # final norms
    model = tiny_model()
    assert model.num_parameters() == expected
    assert model.num_parameters(exclude_embeddings=True) == expected - vocab * d - vocab * dim - d
    model.model.decoder.embed_tokens.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == expected - vocab * d


# ---- generation


@every_architecture
def test_generation_in_inference_mode(catalogue, architecture):
    model, context, _ = prepared(catalogue, architecture)
    expected = model.generate(**context, num_beams=4, num_return_sequences=4)
    with torch.inference_mode():
        assert torch.equal(model.generate(**context, num_beams=4, num_return_sequences=4), expected)


@every_architecture
def test_ways_to_generate_agree(catalogue, architecture):
    """transformers' own loop without a cache, with a static cache and with scores, against the package's search."""
    model, context, _ = prepared(catalogue, architecture)
    found = {"num_beams": 3, "num_return_sequences": 3, "num_session_items": 1, "return_dict_in_generate": True}
    expected = model.generate(**context, **found)
    for extra in ({"use_cache": False}, {"cache_implementation": "static"}, {}):
        own = model.generate(**context, **found, **extra, output_scores=True, max_new_tokens=3)
        assert torch.equal(own.sequences, expected.sequences) and len(own.scores) == 3
        assert_close(own.sequences_scores, expected.sequences_scores)


# ---- graphs


class Decode(nn.Module):
    """What a serving process runs: hidden states of the beams of users whose context is encoded."""

    def __init__(self, model):
        super().__init__()
        self.model = model.model

    def forward(self, input_ids, keys, values, mask):
        kv = ContextKV(key_states=tuple(keys), value_states=tuple(values), mask=mask)
        return self.model(input_ids, context_kv=kv, use_cache=False).last_hidden_state


def test_export(catalogue):
    """`torch.export` of V2's context processor and decoder: any number of users, any history, four beams each."""
    model, context, targets = prepared(catalogue, "v2_moe", num_hidden_layers=2, first_dense_layers=1)
    model.set_experts_implementation("batched_mm")
    users, items = Dim("users", min=2, max=64), Dim("items", min=2, max=512)
    shapes = ({0: users, 1: items},) * 2
    encode = torch.export.export(
        model.model.context_processor,
        (context["context_ids"], context["context_mask"]),
        dynamic_shapes={"context_ids": shapes[0], "context_mask": shapes[1]},
    ).module()
    rows = rows_of(targets, model)[:3, :3].repeat_interleave(4, dim=0)  # BOS and two codes
    kv = model.encode_context(**context)
    states = [{0: users, 2: Dim("slots", min=3, max=513)} for _ in kv.key_states]
    decode = torch.export.export(
        Decode(model),
        (rows, list(kv.key_states), list(kv.value_states), kv.mask),
        dynamic_shapes=({0: 4 * users}, states, states, {0: users, 1: states[0][2]}),
    ).module()
    more = {name: torch.cat([torch.cat([tensor] * 2, dim=1)] * 3) for name, tensor in context.items()}
    kv = encode(more["context_ids"], more["context_mask"])
    found = decode(torch.cat([rows] * 3), list(kv["key_states"]), list(kv["value_states"]), kv["mask"])
    expected = model.model(torch.cat([rows] * 3), **more).last_hidden_state
    assert_close(found, expected)


@pytest.mark.skipif(
    os.environ.get("ONEREC_SLOW_TESTS") != "1",
    reason="inductor compiles C++ for half a minute of CPU time; set ONEREC_SLOW_TESTS=1",
)
def test_inductor(catalogue):
    model, context, targets = prepared(catalogue, "v2", num_hidden_layers=1)
    model.train()
    expected = model(target_ids=targets, **context).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model.forward, fullgraph=True)(target_ids=targets, **context).loss
    loss.backward()
    assert_close(loss, expected)
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, gradients)


# ---- several processes


def _save_sharded(model, folder, rank):
    """What a trainer does at the end of a sharded run."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)


def _shard_on_one_rank(rank, folder):
    torch.distributed.init_process_group("gloo")
    items, mesh = tiny_catalogue(), init_device_mesh("cpu", (2,))
    for architecture in ("v1", "v2_moe"):
        plain = tiny_model(items, architecture=architecture).train()
        model = copy.deepcopy(plain)
        for layer in (*model.model.decoder.layers, *getattr(model.model.context_processor, "layers", [])):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "generate")
        context, targets = tiny_context(items, plain, batch=4), targets_of(items, plain, batch=4)
        own = slice(2 * rank, 2 * rank + 2)
        plain(target_ids=targets, **context).loss.backward()
        part = {name: tensor[own] for name, tensor in context.items()}
        model(target_ids=targets[own], **part).loss.backward()
        scale = max(parameter.grad.abs().max().item() for parameter in plain.parameters())
        for (name, expected), parameter in zip(plain.named_parameters(), model.parameters()):
            assert parameter.to_local().numel() < expected.numel() or len(expected) == 1, f"{name} is not sharded"
            assert_close(parameter.grad.full_tensor(), expected.grad, scale=scale)
        found = model.eval().generate(**part, num_beams=4)
        assert torch.equal(found, plain.eval().generate(**part, num_beams=4))
        _save_sharded(model, folder / architecture, rank)
    reward = tiny_reward(*SESSION)
    fully_shard(reward, mesh=mesh)
    _save_sharded(reward, folder / "reward", rank)


def test_fsdp2(tmp_path):
    """Two processes, each block sharded: gradients, averaged over the processes, and generated items as of the whole
    model.

    What is saved of it is what the whole model would have saved: torch's class around it is no class of the
    repository.
    """
    run_processes(_shard_on_one_rank, tmp_path)
    catalogue = tiny_catalogue()
    for name, plain in (
        ("v1", tiny_model(catalogue, architecture="v1")),
        ("v2_moe", tiny_model(catalogue, architecture="v2_moe")),
        ("reward", tiny_reward(*SESSION)),
    ):
        plain.save_pretrained(tmp_path / "plain" / name)
        saved, whole = tmp_path / name, tmp_path / "plain" / name
        assert {file.name for file in saved.iterdir()} == {file.name for file in whole.iterdir()}
        assert (saved / "config.json").read_text(encoding="utf-8") == (whole / "config.json").read_text(
            encoding="utf-8"
        )
        loaded = AutoModel.from_pretrained(saved)
        assert type(loaded) is type(plain)
        for key, tensor in plain.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key


EXPERT_PARALLEL = hasattr(PreTrainedModel, "ep_plan")  # not yet in the oldest transformers that is supported


@pytest.mark.parametrize("kind", ["tp", "ep"] if EXPERT_PARALLEL else ["tp"])
def test_every_rule_of_a_parallel_plan_names_something(kind):
    """A rule with a slip of the pen splits nothing, and nobody says so."""
    for architecture in ("onerec", "v1", "v2_moe"):
        gated = {"gated_mlp": True, "num_shared_experts": 1}
        # one block dense, one with experts, in encoder and decoder
        model = tiny_model(architecture=architecture, num_hidden_layers=2, first_dense_layers=1, **gated).model
        names = {
            re.sub(r"\.\d+", ".*", name) for name, _ in (*model.named_modules(), *model.named_parameters()) if name
        }
        names |= {name.removesuffix(".weight") for name in names}
        missing = set(getattr(model.config, f"base_model_{kind}_plan")) - names
        # the encoder of OneRec is dense
        assert all("context_processor" in rule and "experts" in rule for rule in missing), missing
        assert not missing or architecture == "onerec"
        assert getattr(model, f"{kind}_plan").items() >= getattr(model.config, f"base_model_{kind}_plan").items()


def _split_on_one_rank(rank, folder):
    torch.distributed.init_process_group("gloo")
    items = tiny_catalogue()
    for architecture in ("onerec", "v1", "v2_moe"):
        plain = tiny_model(items, architecture=architecture)
        context, targets = tiny_context(items, plain), targets_of(items, plain)
        expected = plain(target_ids=targets, **context).target_log_probs
        for settings in ({"tp_size": 2}, {"tp_size": 2, "ep_size": 2}) if EXPERT_PARALLEL else ({"tp_size": 2},):
            model = AutoModel.from_pretrained(folder / architecture, distributed_config=DistributedConfig(**settings))
            weight = model.model.decoder.layers[-1].mlp.experts.down_proj
            assert weight.to_local().numel() * 2 == weight.numel()
            torch.testing.assert_close(
                model(target_ids=targets, **context).target_log_probs, expected, atol=1e-4, rtol=1e-4
            )
            assert torch.equal(model.generate(**context, num_beams=4), plain.generate(**context, num_beams=4))


def test_tensor_and_expert_parallel(tmp_path):
    """Two processes, each with half of the heads and of the experts, score and generate as the whole model."""
    for architecture in ("onerec", "v1", "v2_moe"):
        tiny_model(tiny_catalogue(), architecture=architecture).save_pretrained(tmp_path / architecture)
    run_processes(_split_on_one_rank, tmp_path)


# ---- LoRA

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "item_proj", "code_proj"]


@every_architecture
def test_lora(catalogue, architecture, tmp_path):
    """Adapters on attention, item maps and experts: they train, travel, merge, and leave what they adapt alone."""
    model, context, targets = prepared(catalogue, architecture)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if model.config.num_experts else None
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS, target_parameters=experts, init_lora_weights=False
    )
    before = model.generate(**context, num_beams=4)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    adapted.train()(target_ids=targets, **context).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())
    kinds = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= kinds and ("experts" in str(trained.keys())) == bool(experts)
    adapted.eval()
    expected = adapted(target_ids=targets, **context).loss
    items = adapted.generate(**context, num_beams=4)
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(**context, num_beams=4), before)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(again(target_ids=targets, **context).loss, expected)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert_close(merged(target_ids=targets, **context).loss, expected)
    assert torch.equal(merged.generate(**context, num_beams=4), items)


@every_architecture
def test_lora_with_checkpointing(catalogue, architecture):
    """Frozen embeddings and checkpointed blocks: gradients still reach the adapters."""
    model, context, targets = prepared(catalogue, architecture)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.train()(target_ids=targets, **context).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)


@every_architecture
def test_lora_without_target_modules(catalogue, architecture):
    """`import onerec_hf.trainers` says what a `LoraConfig` without `target_modules` adapts: queries, keys, values,
    outputs.
    """
    model, context, targets = prepared(catalogue, architecture)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))
    adapted.train()(target_ids=targets, **context).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained}
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())
