"""The command `onerec`: from a log to a served model, `onerec COMMAND --help` for each step.

What a command needs is imported when it runs, so that the list of commands is there at once.
"""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from .scripts.short_errors import show_short_errors

SCRIPTS = Path(__file__).parent / "scripts"
COMMANDS = {
    "prepare": "a log -> splits, item embeddings and semantic IDs: the data folder",
    "sft": "train OneRec, OneRecV1 or OneRec-V2 on a data folder",
    "baseline": "fit popularity, item-kNN, SASRec, TIGER, ... on a data folder",
    "leaderboard": "run models and baselines with several seeds, and compare them",
    "reward": "train a reward model on what was shown and what came of it",
    "dpo": "align a model with preferences (Iterative Preference Alignment)",
    "grpo": "reinforcement learning (GRPO, ECPO, GBPO)",
    "score": "score a saved model on the test split",
    "rerank": "fit a re-ranker of a model and baselines on the validation split",
    "publish": "write the card of a model, and push it to the Hub",
    "recommend": "recommend items for every row of a data set",
    "export": "write a model as graphs (torch.export, ONNX) with a search in NumPy",
    "demo": "a page to try a model in the browser",
    "serve": "serve a model over HTTP, and swap model and catalogue under traffic",
    "ab_test": "let two models serve the same simulated users",
    "loop": "simulated days of serving, logging and training, each in a process of its own",
    "quickstart": "the whole path on a simulated log, in minutes",
}
LAUNCHED = ("sft", "reward", "dpo", "grpo", "recommend")  # by `accelerate launch`: on as many processes as it is told
# what the scripts import; `pip install 'onerec_hf[train]'` brings it
TRAIN = ("accelerate", "datasets", "duckdb", "jinja2", "matplotlib", "peft", "scipy", "tensorboard", "trl", "yaml")
# what an extra brings beside them, and the commands that need it
BESIDE = {
    "serve": ("fastapi", "prometheus_client", "pydantic", "uvicorn"),
    "demo": ("gradio",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
EXTRAS = {"serve": "serve", "loop": "serve", "demo": "demo", "export": "export"}


def names(folder: str) -> list[str]:
    """The YAML files of a folder of `scripts`, without the suffix."""
    root = SCRIPTS / folder
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def help_text() -> str:
    """What `onerec --help` prints."""
    commands = "\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())
    return f"""usage: onerec COMMAND [arguments]; onerec COMMAND --help tells a command's arguments

{commands}

Every argument can stand in a YAML file: --config FILE, or --config NAME for one of
{SCRIPTS / "configs"}, such as small_sft.yaml.
{", ".join(LAUNCHED)} are started by accelerate:
  --accelerate_config  {" | ".join(names("accelerate_configs"))} | FILE
  --num_processes N    default: every GPU of the machine, or what the file says"""


def launch_arguments(command: str, argv: list[str]) -> list[str]:
    """The arguments of `accelerate launch`; raises `SystemExit` with the reason where there is no such configuration
    or GPU.
    """
    parser = argparse.ArgumentParser(f"onerec {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes", type=int)
    args, script = parser.parse_known_args(argv)
    launch = []
    if args.accelerate_config is not None:
        places = [Path(args.accelerate_config), SCRIPTS / "accelerate_configs" / f"{args.accelerate_config}.yaml"]
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            known = ", ".join(names("accelerate_configs"))
            raise SystemExit(
                f"onerec {command}: accelerate_config={args.accelerate_config!r} is no file; allowed are {known}, or "
                "the path of a file that `accelerate config` wrote."
            )
        launch += ["--config_file", str(path)]
        import yaml

        if args.num_processes is None and "num_processes" not in yaml.safe_load(path.read_text(encoding="utf-8")):
            import torch

            args.num_processes = torch.cuda.device_count()
            if args.num_processes == 0:
                raise SystemExit(
                    f"onerec {command}: accelerate_config={args.accelerate_config!r} is for GPUs, and torch finds "
                    "none here. On a processor: --accelerate_config cpu_2, or none for one process."
                )
    if args.num_processes is not None:
        launch += ["--num_processes", str(args.num_processes)]
    return [*launch, "-m", f"onerec_hf.scripts.{command}", *script]


def launch(command: str, argv: list[str]) -> None:
    """`accelerate launch` of a script; ends with its exit code where it fails, after its own message."""
    arguments = launch_arguments(command, argv)
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except CalledProcessError as error:
        raise SystemExit(error.returncode) from None


def main(argv: list[str] | None = None) -> None:
    """Runs `onerec`; `argv`: its arguments, by default those of the command line."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(help_text())
        return
    if command not in COMMANDS:
        raise SystemExit(f"onerec: there is no command {command!r}; allowed are {', '.join(COMMANDS)}.")
    extra = EXTRAS.get(command, "train")
    needed = (*TRAIN, *BESIDE.get(extra, ()))
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise SystemExit(
            f"onerec {command} needs packages that are not installed, {', '.join(absent)}: pip install "
            f"'onerec_hf[{extra}]'"
        )
    if command in LAUNCHED and not {"-h", "--help"} & set(rest):
        launch(command, rest)
    else:
        show_short_errors(command)
        importlib.import_module(f".scripts.{command}", __package__).run(rest)


if __name__ == "__main__":
    main()
