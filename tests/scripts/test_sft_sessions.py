"""A model of sessions is as long as the sessions it is trained on: no position is served that nothing trains."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.scripts import prepare, sft
from onerec_hf.trainers import OneRecSFTConfig

MODEL = {"model_type": "onerec", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
MODEL |= {"num_encoder_layers": 1, "num_attention_heads": 2, "num_experts": 0}
SIZES = {"collaborative_dim": 8, "codebook_size": 8, "num_levels": 2}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Six requests of six items per user."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("sessions")
    log = pd.DataFrame({"user_id": np.repeat(np.arange(20), 36)})
    log["item_id"] = np.concatenate([rng.permutation(30)[:6] for _ in range(120)])
    log = log.assign(request_id=np.arange(720) // 6, timestamp=np.tile(np.arange(36), 20), is_click=1)
    log.to_parquet(folder / "log.parquet")
    return folder / "log.parquet"


def data_of(log, folder, size, least=5):
    sessions = {"request": "request_id", "min_watch_time_ms": 0, "min_interactions": 0, "interactions": {}}
    sessions |= {"session_size": size, "min_watched": least}
    arguments = {"feedback": ["request_id", "is_click"], "sessions": sessions} if size else {}
    prepare.main(prepare.PrepareArguments(str(log), str(folder), **arguments, **SIZES))
    return str(folder)


def train(data, output, items=None, model=MODEL, **settings):
    model = model | ({} if items is None else {"num_session_items": items})
    arguments = sft.ModelArguments(data, model, num_beams=20, max_history=10, score=False, **settings)
    training = OneRecSFTConfig(str(output), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    return sft.main(arguments, training)


@pytest.mark.parametrize("streaming", [False, True])
def test_shorter_sessions_than_the_model_writes_are_refused(streaming, log, tmp_path):
    data = data_of(log, tmp_path / "data", 3)
    message = (
        r"the training split has sessions of at most 3, .* num_session_items=5 items: nothing would train the last 2"
    )
    with pytest.raises(ValueError, match=message + r'.*"num_session_items": 3'):
        train(data, tmp_path / "run", streaming=streaming)
    with pytest.raises(ValueError, match="num_session_items=2 items"):
        train(data, tmp_path / "run", 2, streaming=streaming)
    train(data, tmp_path / "run", 3, streaming=streaming)


def test_events_one_by_one_are_no_sessions(log, tmp_path):
    data = data_of(log, tmp_path / "data", None)
    with pytest.raises(ValueError, match=r"has targets one by one, rows of 1, .*\"num_session_items\": 1"):
        train(data, tmp_path / "run")
    train(data, tmp_path / "run", 1)


def test_one_session_of_the_length_is_enough(log, tmp_path):
    """Also where it comes after the first rows of a stream."""
    own = pd.read_parquet(log)
    own = own[(own.index % 6 < 3) | (own.user_id == 19)]
    own.to_parquet(tmp_path / "log.parquet")
    data = data_of(tmp_path / "log.parquet", tmp_path / "data", 6, least=3)
    for streaming in (False, True):
        train(data, tmp_path / f"run {streaming}", 6, streaming=streaming)


def test_fractions_as_categories_stop_no_training_in_its_middle(log, tmp_path):
    table = pd.read_parquet(log)
    table.loc[table["user_id"] == 7, "rating"] = 2.5
    table["rating"] = table["rating"].fillna(3.0)
    prepare.main(prepare.PrepareArguments(table, str(tmp_path / "data"), feedback=["rating"], **SIZES))
    with pytest.raises(ValueError, match=r"'rating' of kind 'category' takes whole numbers, got 2\.5"):
        train(str(tmp_path / "data"), tmp_path / "run", 1, event_features={"rating": ["category", 6]})
    assert not (tmp_path / "run" / "config.json").exists()
