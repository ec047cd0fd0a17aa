"""The command `onerec`: its list, its errors, and how it starts what accelerate starts."""

import configparser
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser

from onerec_hf import cli
from onerec_hf.scripts import parser, short_errors
from onerec_hf.scripts.parser import CONFIGS, ScriptParser, config_path
from onerec_hf.scripts.score import ScoreArguments

ROOT = Path(__file__).resolve().parents[2]


def test_the_list_of_commands_needs_no_torch():
    code = "import sys; from onerec_hf.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {name} " in result.stdout for name in cli.COMMANDS)


def test_every_script_is_a_command_and_every_command_a_recipe():
    scripts = {path.stem for path in cli.SCRIPTS.glob("*.py") if "\ndef run(" in path.read_text(encoding="utf-8")}
    assert scripts == set(cli.COMMANDS) == {path.stem for path in (ROOT / "recipes").glob("*.py")}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stf"], "no command 'stf'; allowed are prepare, sft, baseline"),
        (["sft", "--accelerate_config", "tpu"], "'tpu' is no file; allowed are cpu_2, deepspeed_zero3, fsdp2"),
    ],
)
def test_what_it_refuses(argv, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(argv)


def test_without_the_packages_of_training_it_names_them(monkeypatch):
    monkeypatch.setattr(cli, "TRAIN", (*cli.TRAIN, "no_such_package"))
    with pytest.raises(SystemExit, match=r"not installed, no_such_package: pip install 'onerec_hf\[train\]'"):
        cli.main(["prepare", "--help"])


def test_the_packages_of_training_are_those_of_the_extra():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = {re.split("[<>=]", line)[0] for line in config["options.extras_require"]["train"].split()}
    assert {"pyyaml" if name == "yaml" else name for name in cli.TRAIN} == wanted


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_argument_says_what_it_is(command):
    """Those of our own dataclasses; transformers and TRL document theirs."""
    module = importlib.import_module(f"onerec_hf.scripts.{command}")
    own = [each for each in vars(module).values() if dataclasses.is_dataclass(each) and isinstance(each, type)]
    own = [each for each in own if each.__module__.startswith("onerec_hf.scripts")]
    silent = [(each.__name__, f.name) for each in own for f in dataclasses.fields(each) if not f.metadata.get("help")]
    assert not silent


@pytest.mark.parametrize("command", cli.BESIDE)
def test_some_commands_need_packages_of_their_own(command, monkeypatch):
    """Those of the extra; the other commands do without them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = {re.split("[<>=]", line)[0] for line in config["options.extras_require"][command].split()}
    assert {name.replace("_", "-") for name in cli.BESIDE[command]} | {"onerec_hf[train]"} == wanted
    monkeypatch.setitem(cli.BESIDE, command, (*cli.BESIDE[command], "no_such_package"))
    with pytest.raises(
        SystemExit, match=rf"not installed, (.*, )?no_such_package: pip install 'onerec_hf\[{command}\]'"
    ):
        cli.main([command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "--help"])
    assert ended.value.code == 0


def test_gpus_are_counted_where_the_file_does_not_say(monkeypatch):
    """`multi_gpu` on a machine with 3 GPUs, with 0, and with a number that was given."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    found = cli.launch_arguments("dpo", ["--accelerate_config", "multi_gpu", "--data", "x", "--bf16", "true"])
    path = str(cli.SCRIPTS / "accelerate_configs" / "multi_gpu.yaml")
    assert found[:6] == ["--config_file", path, "--num_processes", "3", "-m", "onerec_hf.scripts.dpo"]
    assert found[6:] == ["--data", "x", "--bf16", "true"]
    found = cli.launch_arguments("dpo", ["--num_processes", "2", "--accelerate_config", "fsdp2"])
    assert found[2:4] == ["--num_processes", "2"]
    assert "--num_processes" not in cli.launch_arguments("dpo", ["--accelerate_config", "cpu_2"])
    assert cli.launch_arguments("sft", ["--seed", "1"]) == ["-m", "onerec_hf.scripts.sft", "--seed", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit, match="is for GPUs, and torch finds none here"):
        cli.launch_arguments("dpo", ["--accelerate_config", "multi_gpu"])


@pytest.mark.parametrize("name", cli.names("accelerate_configs"))
def test_accelerate_reads_its_configs(name):
    """Keys that accelerate does not know are an error there."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(cli.SCRIPTS / "accelerate_configs" / f"{name}.yaml"))
    assert config.mixed_precision == "no" and config.use_cpu == (name == "cpu_2")


def test_a_config_is_a_path_or_a_name_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path("small_sft.yaml") == str(CONFIGS / "small_sft.yaml")
    assert config_path("models/onerec_v2_1b.yaml") == str(CONFIGS / "models" / "onerec_v2_1b.yaml")
    Path("small_sft.yaml").write_text("num_beams: 30")  # one's own comes first
    assert config_path("small_sft.yaml") == "small_sft.yaml"
    with pytest.raises(
        FileNotFoundError, match=r"'smal.yaml' is no file here, and onerec_hf has no config.*small_sft"
    ):
        config_path("smal.yaml")


@pytest.mark.parametrize("form", [["--config", "own.yaml"], ["--config=own.yaml"]])
def test_yaml_gives_defaults_that_the_command_line_overrides(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(yaml.safe_dump({"model": "m", "data": "d", "num_beams": 30, "seed": 7}))
    (args,) = ScriptParser("score", None, [ScoreArguments]).parse([*form, "--seed", "8"])
    assert (args.model, args.num_beams, args.seed) == ("m", 30, 8)


def test_a_config_without_a_name_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        ScriptParser("score", None, [ScoreArguments]).parse(["--config"])
    assert "onerec score: error: --config needs a YAML file" in capsys.readouterr().err


def test_one_process_in_place_of_two_is_said(capfd):
    """As `accelerate launch` starts it; what else is wrong is found after it."""
    command = ["--cpu", "--num_processes", "2", str(ROOT / "recipes" / "score.py"), "--model", "absent"]
    with pytest.raises(subprocess.CalledProcessError):
        launch_command(launch_command_parser().parse_args([*command, "--data", "absent"]))
    said = capfd.readouterr().err
    assert "told several processes and started one" in said and "--accelerate_config cpu_2" in said
    assert "absent" in said.split("cpu_2")[-1]


@pytest.mark.parametrize(
    ("environment", "warnings"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 0),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, 1),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, 0),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"}, 0),
        ({"MASTER_ADDR": "127.0.0.1"}, 0),
    ],
)
def test_several_processes_are_not_warned_of(environment, warnings, monkeypatch):
    """One process by accelerate; one in place of two; two by torchrun; two by MPI; none of them."""
    said = []
    monkeypatch.setattr(parser.os, "environ", environment)
    monkeypatch.setattr(parser.logger, "warning", said.append)
    parser.warn_of_one_process()
    assert len(said) == warnings


@pytest.mark.parametrize("words", [["--modle", "outputs/model"], ["--config", "score.yaml"]])
def test_arguments_that_there_are_not(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("score.yaml").write_text("modle: outputs/model\n", encoding="utf-8")
    message = r"no arguments \['--modle'\]: `onerec score --help` lists .*Near to that: --model\."
    with pytest.raises(ValueError, match=message):
        ScriptParser("score", None, [ScoreArguments]).parse(["--model", "a", "--data", "b", *words])


@pytest.mark.parametrize("words", [["-m", "onerec_hf.cli", "score"], ["recipes/score.py"]])
@pytest.mark.parametrize("debug", ["0", "1"])
def test_what_is_refused_is_said_without_a_traceback(words, debug, tmp_path):
    argv = [sys.executable, *words, "--model", "nothing", "--data", str(tmp_path)]
    environment = os.environ | {"HF_DEBUG": debug, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert found.returncode == 1 and f"{tmp_path} is no data folder" in found.stderr
    assert ("Traceback" in found.stderr) == (debug == "1")
    assert ("\nonerec score: " in "\n" + found.stderr) == (debug == "0")


def test_errors_of_other_packages_keep_their_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", None)
    monkeypatch.delenv("HF_DEBUG", raising=False)
    short_errors.show_short_errors("score")
    # of another package; of this one, but nobody meant to raise it
    for wrong in (lambda: json.loads("{"), lambda: cli.names(1)):
        with pytest.raises((ValueError, TypeError)) as error:
            wrong()
        sys.excepthook(error.type, error.value, error.tb)
        assert "Traceback" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError) as missing:
        config_path("nothing.yaml")
    sys.excepthook(missing.type, missing.value, missing.tb)
    said = capsys.readouterr().err
    assert said.startswith("onerec score: 'nothing.yaml' is no file here") and "Traceback" not in said
