"""Item-kNN against brute force; BERT4Rec, FDSA and TIGER on a world they can learn exactly, and what each of them
promises.
"""

import itertools

import datasets
import numpy as np
import pytest
import torch

from onerec_hf import Catalogue
from onerec_hf.baselines import FDSA, TIGER, BERT4Rec, ItemKNN, attribute_codes
from onerec_hf.baselines.training import windows
from onerec_hf.evaluation import evaluate

from ..numeric import assert_close
from .test_baselines import cycles, next_in_cycle

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def catalogue(num_items=12):
    """Two levels of 4 codes; item 11 shares the codes of item 10, and the third level tells them apart."""
    codes = [[min(i, 10) // 4, min(i, 10) % 4, int(i == 11)] for i in range(num_items)]
    return Catalogue(codes, [4, 4, 2])


def bert(**kwargs):
    return BERT4Rec(12, **(TINY | {"max_length": 8, "dropout": 0.0} | kwargs))


def fdsa(**kwargs):
    return FDSA([[i % 3, 3 + i % 2] for i in range(11)] + [[]], **(TINY | {"max_length": 8, "dropout": 0.0} | kwargs))


def tiger(**kwargs):
    sizes = TINY | {"intermediate_size": 32, "head_dim": 8, "max_length": 4, "num_user_tokens": 5, "dropout": 0.0}
    return TIGER(catalogue(), **(sizes | {"num_beams": 12} | kwargs))


def fit(model, histories, **kwargs):
    arguments = {"num_epochs": 1, "batch_size": 10, "warmup_steps": 0, "progress": False} | kwargs
    if isinstance(model, TIGER):
        return model.fit(histories, range(len(histories)), **arguments)
    return model.fit(histories, **arguments)


def queries(histories):
    return {"history": histories, "user": list(range(len(histories)))}


# -- item-kNN


def brute_force_knn(histories, history, num_items, neighbors, shrink, decay):
    users = [{u for u, row in enumerate(histories) if i in row} for i in range(num_items)]
    scores = np.zeros(num_items)
    for age, i in enumerate(reversed(history)):
        similar = {
            j: len(users[i] & users[j]) / ((len(users[i]) * len(users[j])) ** 0.5 + shrink)
            for j in range(num_items)
            if j != i and users[i] & users[j]
        }
        for j in sorted(similar, key=lambda j: -similar[j])[:neighbors]:
            scores[j] += decay**age * similar[j]
    return scores


@pytest.mark.parametrize(("neighbors", "shrink", "decay"), [(100, 0.0, 1.0), (3, 2.5, 0.7)])
def test_item_knn_equals_the_definition(neighbors, shrink, decay):
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 15, rng.integers(1, 9)).tolist() for _ in range(40)]  # with repeats
    model = ItemKNN(16, num_neighbors=neighbors, shrink=shrink, decay=decay).fit(histories)
    history = [3, 3, 7, 15, 1]  # nobody has item 15
    ours = model._scores([history, [], history[:1]])
    assert (ours[1] == 0).all()
    if neighbors >= 15:  # otherwise ties at the last neighbour may be broken in another way
        expected = brute_force_knn(histories, history, 16, neighbors, shrink, decay)
        np.testing.assert_allclose(ours[0], expected, rtol=1e-12)
    else:
        similarity = model.similarity.toarray()
        assert (np.count_nonzero(similarity, axis=1)[:15] == 3).all() and not similarity.diagonal().any()
        everything = ItemKNN(16, num_neighbors=99, shrink=shrink).fit(histories).similarity.toarray()
        for kept, all_of_them in zip(similarity[:15], everything):
            assert kept[kept > 0].min() >= np.sort(all_of_them)[-3]


def test_item_knn_falls_back_to_popularity_and_says_what_is_wrong():
    model = ItemKNN(5).fit([[0, 1], [0, 1], [2], [2], [2]])
    ranked = model.recommend({"history": [[0]]}, 5)
    assert ranked[0, :2].tolist() == [1, 2] and ranked[0, -2:].tolist() != [1, 2]
    assert model.recommend({"history": [[0]]}, 5, exclude_seen=True)[0, -1] == -1
    with pytest.raises(ValueError, match="fit"):
        ItemKNN(3).recommend({"history": [[0]]}, 1)
    with pytest.raises(ValueError, match="index 7"):
        ItemKNN(3).fit([[7]])


# -- what the trained ones share


def test_windows_hold_every_step_once():
    assert windows([[1, 2, 3, 4, 5, 6, 7], [8], [], [9, 10]], 4) == [[4, 5, 6, 7], [1, 2, 3, 4], [9, 10]]
    steps = [pair for window in windows([list(range(23))], 5) for pair in itertools.pairwise(window)]
    assert sorted(steps) == [(i, i + 1) for i in range(22)]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (bert, {"num_epochs": 40, "learning_rate": 0.005, "last_item_share": 0.5}),
        (fdsa, {"num_epochs": 12, "learning_rate": 0.03}),
        (tiger, {"num_epochs": 8, "learning_rate": 0.02, "batch_size": 20}),
        (tiger, {"num_epochs": 8, "learning_rate": 0.02, "batch_size": 20, "bf16": True}),
    ],
)
def test_they_learn_a_cycle(make, settings, tmp_path):
    model = fit(make(hidden_size=32), cycles(), **settings)
    result = evaluate(model, next_in_cycle(), num_items=12, ks=(1, 3), progress=False)
    assert result.metrics["recall@1"] > 0.5  # by chance: 1 / 12
    assert result.metrics["invalid_rate"] == 0.0

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert (again.num_items, again.max_length) == (model.num_items, model.max_length)
    assert (again.recommend(queries(cycles()), 12) == model.recommend(queries(cycles()), 12)).all()


@pytest.mark.parametrize("make", [bert, fdsa, tiger])
def test_repeatable_by_seed(make):
    weights = [next(iter(fit(make(seed=s), cycles(20), seed=s).model.parameters())) for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("make", [bert, fdsa, tiger])
def test_neither_batch_nor_padding_matters(make):
    model = make()
    histories = [[1], [2, 3, 4, 5, 6, 7], [1, 2], list(range(11))]
    together = model.recommend({"history": histories, "user": [7] * 4}, 12)
    alone = [model.recommend({"history": [history], "user": [7]}, 12) for history in histories]
    assert (together == np.concatenate(alone)).all()
    assert (np.sort(together) == np.arange(12)).all()
    masked = model.recommend({"history": histories, "user": [7] * 4}, 12, exclude_seen=True)
    assert masked[3].tolist() == [11] + [-1] * 11
    assert sorted(masked[1].tolist()) == [-1] * 6 + [0, 1, 8, 9, 10, 11]


@pytest.mark.parametrize("make", [bert, fdsa, tiger])
def test_errors(make):
    with pytest.raises(ValueError, match="two items"):
        fit(make(), [[1], []])
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        make().recommend(queries([[1], []]), 1)
    with pytest.raises(ValueError, match="needs `validate`"):
        fit(make(), cycles(), patience=2)


def test_the_best_epoch_is_kept_and_patience_stops():
    values, seen = iter([0.1, 0.9, 0.3, 0.2, 1.0]), []

    def validate(model):
        assert not model.model.training
        seen.append(model.model.items.wte.weight.detach().clone())
        return next(values)

    model = fit(fdsa(), cycles(20), validate=validate, num_epochs=5, patience=2)
    assert [(r["epoch"], r["validation"]) for r in model.training_log] == [(1, 0.1), (2, 0.9), (3, 0.3), (4, 0.2)]
    assert torch.equal(model.model.items.wte.weight, seen[1]) and not torch.equal(seen[1], seen[3])


# -- BERT4Rec


def test_cloze_masks_the_right_share():
    model, rows = bert(), [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 0, 1, 2, 3]]
    torch.manual_seed(0)
    counts = []
    for _ in range(200):
        batch = model._masked(rows, 0.4, 0.0)
        hidden = batch["labels"] != -100
        assert (batch["input_ids"][hidden] == 12).all()
        whole = torch.where(hidden, batch["labels"], batch["input_ids"])
        assert [[i for i in row if i < 13] for row in whole.tolist()] == rows
        assert hidden.sum(1).tolist() == [2, 1, 3]  # round(.4 * length)
        counts.append(hidden[0, :5].float())
    assert torch.stack(counts).mean(0).tolist() == pytest.approx([0.4] * 5, abs=0.12)
    only_last = model._masked(rows, 0.4, 1.0)["labels"]
    assert only_last.tolist() == [[-100] * 4 + [5] + [-100] * 3, [-100, 7] + [-100] * 6, [-100] * 7 + [3]]


def test_bert4rec_scores_are_the_models_own_logits():
    model = bert()
    torch.nn.init.normal_(model.model.cls.predictions.bias)
    input_ids = torch.tensor([[1, 2, 3, 12]])
    logits = model.model(input_ids=input_ids).logits
    hidden, items = model._score_vectors(model._hidden(input_ids))
    assert_close(hidden @ items.T, logits[..., :12])
    labels = torch.tensor([[-100, 4, -100, 5]])
    loss, count = model._softmax_loss({"input_ids": input_ids, "labels": labels})
    expected = torch.nn.functional.cross_entropy(logits[0, [1, 3], :12], torch.tensor([4, 5]), reduction="sum")
    assert_close(loss, expected)
    assert count == 2


# -- FDSA


def test_attribute_codes():
    codes = attribute_codes(["a", None, "b", "a"], [[1, 2], [], [2, 2], None])
    assert codes == [[0, 1, 2], [], [3, 2], [0]]
    assert attribute_codes([1], [1]) == [[0, 1]]  # two columns, two attributes
    with pytest.raises(ValueError, match="not all of them empty"):
        FDSA([[], []])


def test_fdsa_reads_attributes_and_nothing_beside_them():
    model = fdsa()
    before = model.model(torch.tensor([[0, 1, 11]]))
    assert before.isfinite().all()  # item 11 has no attribute
    with torch.no_grad():
        model.model.attributes.weight[0] += 1.0  # the pad
    assert_close(model.model(torch.tensor([[0, 1, 11]])), before)
    with torch.no_grad():
        model.model.attributes.weight[2] += 1.0  # attribute 1 of item 1
    after = model.model(torch.tensor([[0, 1, 11]]))
    assert torch.equal(after[:, 0], before[:, 0]) and not torch.allclose(after[:, 1], before[:, 1])


# -- TIGER


def test_tiger_spells_users_and_items():
    model = tiger(max_length=2)
    rows = [{"user": 7, "input_ids": [0, 11], "targets": [6]}, {"user": 4, "input_ids": [10], "targets": [11]}]
    batch = model._collate(rows)
    # pad 0, level 1: 1..4, level 2: 5..8, level 3: 9..10, users: 11..15
    assert batch["input_ids"].tolist() == [[13, 1, 5, 9, 3, 7, 10], [15, 3, 7, 9, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert batch["labels"].tolist() == [[2, 7, 9], [3, 7, 10]]
    loss, count = model._loss(batch)
    assert_close(loss / count, model.model(**batch).loss)


@pytest.mark.parametrize("causal", [False, True])
def test_tiger_drops_dead_beams_and_ranks_by_probability(causal):
    """More beams than items: what is left is the exact ranking of all items by T5's own probabilities, padding or
    not.
    """
    model, history = tiger(num_beams=40, num_user_tokens=0, causal_items=causal), [3, 4]
    ranked = model.recommend({"history": [history, [1, 2, 3, 4]]}, 40)[0]
    assert (ranked[12:] == -1).all()
    inputs = model._encoder_inputs(None, [history])
    if causal:
        bias = torch.nn.init.normal_(
            model.model.item_distance.weight, std=3.0, generator=torch.Generator().manual_seed(0)
        )
        ranked = model.recommend({"history": [history, [1, 2, 3, 4]]}, 40)[0]
        mask = bias[[1, 1, 1, 0, 0, 0]].T[None, :, None].expand(-1, -1, 3, -1)
        inputs = {"encoder_outputs": (model._encode(inputs),), "attention_mask": mask}
    scores = []
    for tokens in model.item_tokens:
        log_probs = model.model(**inputs, labels=tokens[None]).logits.log_softmax(-1)
        scores.append(log_probs[0, torch.arange(3), tokens].sum().item())
    assert ranked[:12].tolist() == np.argsort(scores)[::-1].tolist()


def test_tiger_with_causal_items_trains_all_targets_of_a_history_as_if_each_were_alone():
    model = tiger(causal_items=True)
    torch.nn.init.normal_(model.model.item_distance.weight, generator=torch.Generator().manual_seed(0))
    rows = [
        {"user": 7, "input_ids": [0, 11, 4], "targets": [11, 4, 9]},
        {"user": 4, "input_ids": [10], "targets": [6]},
    ]
    total, count = model._loss(model._collate(rows))
    assert count == 12
    alone = 0.0
    for row in rows:
        for end, target in enumerate(row["targets"], start=1):
            inputs = model._encoder_inputs([row["user"]], [row["input_ids"][:end]])
            states, labels = model._encode(inputs), model.item_tokens[[target]]
            back = torch.tensor([4] + [end - 1 - item for item in range(end) for _ in range(3)])  # 4: the user token
            mask = model.model.item_distance.weight[back].T[None, :, None].expand(-1, -1, 3, -1)
            alone += 3 * model.model(encoder_outputs=(states,), attention_mask=mask, labels=labels).loss
    assert_close(total, alone)
    short, long = (model._encode(model._encoder_inputs([7], [items])) for items in ([0], [0, 11]))
    assert_close(long[:, :4], short)


@pytest.mark.parametrize("causal", [False, True])
def test_tiger_trains_on_every_item_but_the_first(causal):
    model, seen = tiger(causal_items=causal), []

    def record(batch):
        seen.append(batch["labels"].cpu())
        return model.model.lm_head.weight.sum() * 0.0, 1

    model._loss = record
    fit(model, [[0, 1, 2, 3, 4, 5], [6], [7, 8]])
    tokens = [row[row != -100].view(-1, 3) for row in seen]
    model.catalogue.to("cpu")
    targets = [model.catalogue.leaves_of(row - torch.tensor(model.level_offsets)) for row in tokens]
    assert sorted(model.catalogue.items_of(torch.cat(targets)[None], 6)[0].tolist()) == [1, 2, 3, 4, 5, 8]


def test_tiger_steps_are_relative_to_the_size_of_a_weight():
    model = tiger()
    before = {name: value.cpu().clone() for name, value in model.model.named_parameters() if value.ndim == 2}
    fit(model, cycles(), num_epochs=1, batch_size=1000, learning_rate=0.02, warmup_steps=0)
    size = {name: value.pow(2).mean().sqrt() for name, value in before.items()}
    for name in ("shared", "encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.o"):
        name = f"{name}.weight"
        step = (model.model.get_parameter(name).cpu() - before[name]).pow(2).mean().sqrt()
        assert 0.3 * 0.02 < step / size[name] < 1.1 * 0.02, name
    # With AdamW the step would be the same for both of these.
    assert size["shared.weight"] > 5 * size["encoder.block.0.layer.0.SelfAttention.q.weight"]
    with pytest.raises(TypeError, match="optimizer"):  # it is not taken and then ignored
        fit(model, cycles(), optimizer=None)


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_reaches_every_matrix_of_the_loss(bf16):
    model, seen = tiger(), set()
    for name in ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"):
        model.model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    fit(model, cycles(), bf16=bf16)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert model.model.dtype == torch.float32


def test_tiger_says_what_it_needs():
    with pytest.raises(ValueError, match="pass `users`"):
        tiger().fit([[1, 2]])
    with pytest.raises(ValueError, match="column `user`"):
        tiger().recommend({"history": [[1]]}, 1)
    with pytest.raises(ValueError, match="num_beams of at least 13"):
        tiger().recommend(queries([[1]]), 13)


def test_tiger_loses_nothing_to_the_evaluation_of_users():
    """Without user tokens a data set needs no users the model knows."""
    model = tiger(num_user_tokens=0)
    data = datasets.Dataset.from_dict({"user": [1], "history": [[1, 2]], "targets": [[3]]})
    assert evaluate(model, data, num_items=12, ks=(12,), progress=False).metrics["recall@12"] == 1.0
