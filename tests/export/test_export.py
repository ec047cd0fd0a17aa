"""Exported steps compute what the model computes, and the search in NumPy over them finds the same items."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from onerec_hf.data import EventFeature
from onerec_hf.export import ExportedRecommender, export_recommender, export_steps
from onerec_hf.export.folder import check_parity, example_context, index_tensors
from onerec_hf.export.numpy_search import Index
from onerec_hf.models.input_checks import at_least
from onerec_hf.scripts import export

from ..numeric import assert_close, assert_same_ranking
from ..test_recommender import HISTORIES, recommender_of
from ..tiny import tiny_catalogue

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onerec_hf[export]")
pytest.importorskip("onnxscript", reason="needs onerec_hf[export]")

FEATURES = {
    "event_features": {"play_time_ms": EventFeature("log", 8)},
    "user_features": {"age": np.array([0, 1, 2])},
}
# what is exported -> architecture, settings of the model, features
CASES = {
    "v2": ("v2", {"num_hidden_layers": 2}, {}),
    "experts": ("v2_moe", {"num_hidden_layers": 2, "first_dense_layers": 1, "score_normalization": "valid"}, FEATURES),
    "onerec": ("onerec", {"num_hidden_layers": 1, "num_encoder_layers": 1}, {}),
    "v1": ("v1", {"num_hidden_layers": 1, "num_encoder_layers": 1, "score_normalization": "valid"}, FEATURES),
}
SLOW = ("experts", "onerec")  # their parts are in the other two; ONEREC_SLOW_TESTS=1 runs them
SKIPPED = () if os.environ.get("ONEREC_SLOW_TESTS") == "1" else SLOW
_MADE: dict[str, tuple] = {}


@pytest.fixture(params=[name for name in CASES if name not in SKIPPED])
def exported(request, tmp_path_factory):
    """A recommender, and the folder it was exported to; each case once, an export takes seconds."""
    if request.param not in _MADE:
        _MADE[request.param] = made(request.param, tmp_path_factory.mktemp(request.param))
    return _MADE[request.param]


def made(case, folder):
    architecture, settings, features = CASES[case]
    recommender = recommender_of(architecture, num_beams=20, settings=settings, **features)
    return recommender, folder, export_recommender(recommender, folder)


def test_the_search_in_numpy_finds_what_the_model_finds(exported):
    """One user and several, short histories and none, beams for every item and for few, with and without a filter."""
    recommender, folder, _ = exported
    model, catalogue = recommender.model, recommender.model.catalogue
    search = ExportedRecommender(folder)
    allowed = np.random.default_rng(0).random((3, catalogue.num_items)) < 0.3
    allowed[0] = False
    for lengths, beams, mask in ([[9], 65, None], [[4, 1, 0], 5, None], [[2, 60, 0], 30, allowed]):
        context = example_context(recommender, lengths, seed=beams)
        found = search.search({name: tensor.numpy() for name, tensor in context.items()}, beams, beams, mask)
        own = None if mask is None else torch.from_numpy(mask)
        expected = model.recommend_items(at_least(beams, 1), num_beams=beams, allowed_items=own, **context)
        for row, items, scores in zip(found, *expected):
            alive = scores > float("-inf")
            assert len(row) == int(alive.sum())
            if not row:  # a filter leaves this user nothing
                continue
            ids = torch.from_numpy(catalogue.item_ids[items[alive].numpy()])
            assert_close(torch.tensor([score for _, score in row], dtype=torch.float32), scores[alive])
            assert_same_ranking(torch.tensor([[item] for item, _ in row]).view(-1, 1), ids.view(-1, 1), scores[alive])
        assert mask is None or found[0] == []


def test_the_parity_check_reports_what_it_compared(exported):
    _, folder, settings = exported
    assert json.loads((folder / "export.json").read_text(encoding="utf-8")) == settings
    worst = settings["parity"]["largest_relative_difference"]
    assert set(worst) == {"encode", "decode", "score"} and 0 < max(worst.values()) < 1e-4
    assert settings["parity"]["items_compared"] == 5 * 20
    for path in folder.iterdir():  # nothing of the machine that made it
        assert str(Path(__file__).resolve().parents[2]).encode() not in path.read_bytes(), path


def test_the_programs_of_torch_take_other_sizes(exported):
    recommender, folder, _ = exported
    model, config = recommender.model, recommender.model.config
    encode, decode = (torch.export.load(folder / f"{name}.pt2").module() for name in ("encode", "decode"))
    context = example_context(recommender, [11], seed=3)
    kv = model.encode_context(**context)
    keys, values, mask = encode(**context)
    assert_close(keys, torch.stack(kv.key_states))
    assert_close(values, torch.stack(kv.value_states))
    past = torch.zeros(config.num_hidden_layers, 1, 2, config.num_key_value_heads, 0, config.head_dim)
    tokens = torch.full((1, 2), config.bos_token_id)
    logits, _, _ = decode(tokens=tokens, keys=keys, values=values, mask=mask, past_keys=past, past_values=past)
    hidden = model.model(tokens[:, :1], context_kv=kv, use_cache=False).last_hidden_state
    assert_close(logits[:, 0], model.lm_head(hidden)[:, 0])
    assert_close(logits[:, 1], logits[:, 0])


def test_a_broken_graph_is_found(tmp_path):
    """Two layers exported, and then other weights."""
    recommender, folder, _ = _MADE.get("v2") or made("v2", tmp_path)
    with torch.no_grad():
        weight = recommender.model.lm_head.weight
        weight[5] += 0.5
        try:
            with pytest.raises(RuntimeError, match=r"the search in NumPy found|exported steps differ from the model"):
                check_parity(recommender, folder)
        finally:
            weight[5] -= 0.5


def test_the_folder_is_enough(tmp_path):
    """`search.py` in a process that cannot import this package, nor torch."""
    recommender, folder, _ = _MADE.get("v2") or made("v2", tmp_path)
    code = "import sys, runpy; sys.modules['torch'] = sys.modules['onerec_hf'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [str(folder / "search.py"), "--history", *map(str, HISTORIES[0]), "--k", "4", "--num_beams", "20"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = recommender.recommend(HISTORIES[:1], k=4)[0]
    assert [int(line.split()[0]) for line in result.stdout.strip().split("\n")] == [one.item_id for one in expected]


def test_histories_of_item_ids(tmp_path):
    """The context is made as the collator makes it; unknown ids, and models that read more, are refused."""
    recommender, folder, _ = _MADE.get("v2") or made("v2", tmp_path)
    search = ExportedRecommender(folder)
    found = search.recommend(HISTORIES, k=3, num_beams=20)
    for row, expected in zip(found, recommender.recommend(HISTORIES, k=3)):
        assert [item for item, _ in row] == [one.item_id for one in expected]
    with pytest.raises(KeyError, match="7"):
        search.recommend([[7]])
    with pytest.raises(ValueError, match="k=9 with num_beams=4: at least 1, and at most num_beams"):
        search.recommend([[]], k=9, num_beams=4)
    search.settings["max_history"] = None
    with pytest.raises(ValueError, match="and not the items of a history alone"):
        search.recommend([[]])


def test_ids_of_text_survive():
    catalogue = tiny_catalogue()
    catalogue.item_ids = np.array([f"é{i}" for i in range(65)])
    index = Index(index_tensors(catalogue, [4, 12, 20]), 3)
    assert index.item_ids.tolist() == catalogue.item_ids.tolist()
    assert [len(first) for first in index.first_child] == [len(codes) + 1 for codes in index.codes]


def test_models_that_are_refused(tmp_path):
    recommender = recommender_of("v2")
    context = example_context(recommender, [3, 2])
    with pytest.raises(ValueError, match=r"the model is in training mode: an export is of float32 on the CPU"):
        export_steps(recommender.model.train(), context, tmp_path)
    with pytest.raises(ValueError, match=r"bfloat16.*call `model.eval\(\).float\(\).cpu\(\)` before"):
        export_steps(recommender.model.eval().bfloat16(), context, tmp_path)


def test_the_command(tmp_path, capsys):
    recommender = recommender_of("v2")
    recommender.save_pretrained(tmp_path / "model")
    export.run(["--repo", str(tmp_path / "model"), "--output", str(tmp_path / "exported"), "--onnx", "false"])
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert names == {"encode.pt2", "decode.pt2", "index.safetensors", "export.json", "search.py"}
    assert str(tmp_path / "exported") in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"holds files \['beam_search.py', .*\] of another kind: name an empty folder"
    ):
        export.run(["--repo", str(tmp_path / "model"), "--output", str(tmp_path / "model")])
