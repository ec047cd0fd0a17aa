"""What a user types first with the commands, on a log of one's own: each call is right, or says what to type in its
place.
"""

import json
from pathlib import Path

import pytest

from onerec_hf.scripts import prepare, sft

from .test_onerec import interactions  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def data(interactions, tmp_path_factory) -> Path:  # noqa: F811
    """A data folder of 60 users and 40 items."""
    folder = tmp_path_factory.mktemp("commands") / "data"
    settings = {"codebook_size": 8, "collaborative_dim": 16}
    prepare.main(prepare.PrepareArguments(source=interactions, output=str(folder), **settings))
    return folder


# ---- sft without a config
# ----------------------------------------------------------------------------------------------


def test_sft_without_a_config_is_small_and_says_how_long_it_takes(data, tmp_path, capsys):
    command = ["--data", str(data), "--output_dir", str(tmp_path), "--max_steps", "20", "--use_cpu", "true"]
    sft.run([*command, "--report_to", "none", "--per_device_train_batch_size", "4", "--num_beams", "20"])
    printed = capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] == 64 and config["num_hidden_layers"] == 2
    parameters = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["num_parameters"]
    assert parameters < 10**6
    assert f"{parameters:,} parameters, {parameters:,} of them trained; 20 steps" in printed
    assert "seconds per step: about " in printed and " seconds left, evaluations apart" in printed


@pytest.mark.parametrize("system", ["onerec", "onerec_v1", "onerec_v2"])
def test_every_system_is_small_unless_a_width_is_named(data, system):
    def config(**given):
        return sft.make_config(sft.ModelArguments(data=str(data), **given), sft.DataFolder(str(data)))

    small = config(model={"model_type": system, "dropout": 0.1})
    assert (small.model_type, small.hidden_size, small.num_experts, small.dropout) == (system, 64, 0, 0.1)
    own = config(model={"model_type": system, "hidden_size": 32, "num_attention_heads": 2})
    assert own.hidden_size == 32 and own.num_hidden_layers == type(own)().num_hidden_layers
    if system == "onerec_v2":
        assert config(model_config="models/onerec_v2_0.1b.yaml").hidden_size == 640
