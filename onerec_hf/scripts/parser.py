"""The arguments of a script: on the command line, in a YAML file of the user, or in one that the package carries."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers.utils import logging
from trl import TrlParser

from .short_errors import show_short_errors

logger = logging.get_logger(__name__)

CONFIGS = Path(__file__).parent / "configs"


def config_path(name: str) -> str:
    """
    A file of that path, or else the package's config of that name, such as `small_sft.yaml` or
    `models/onerec_v2_1b.yaml`.

    Raises:
        FileNotFoundError: Where neither is there; the message lists the package's configs.
    """
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return str(path)
    known = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
    raise FileNotFoundError(f"{name!r} is no file here, and onerec_hf has no config of that name; it has {known}.")


def warn_of_one_process() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word; torchrun starts two."""
    # accelerate names a meeting place where it is told several processes; who starts them also says how many they are
    told = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ)
    if told and not any(name.endswith("WORLD_SIZE") or name == "PMI_SIZE" for name in os.environ):
        logger.warning(
            "accelerate was told several processes and started one, as it does on a CPU. Two are started by `onerec "
            "COMMAND --accelerate_config cpu_2` (N: with --num_processes N), or by `torchrun --nproc_per_node 2`."
        )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every argument."""


class ScriptParser(TrlParser):
    """
    `TrlParser` whose `--config` also takes the name of a config that the package carries.

    Args:
        name (`str`): Of the script, as in `onerec sft`.
        description (`str`): The script's docstring, for `--help`.
        dataclass_types: The dataclasses that hold the arguments.
    """

    def __init__(self, name: str, description: str | None, dataclass_types: Iterable[Any]):
        super().__init__(
            list(dataclass_types), prog=f"onerec {name}", description=description, formatter_class=_HelpFormatter
        )

    def parse(self, args: Sequence[str] | None = None) -> tuple:
        """
        One object per dataclass, from `args` (default: those of the command line) and the YAML file they name.

        Raises:
            ValueError: For arguments that there are not, in either.
        """
        if args is None:
            show_short_errors(self.prog.removeprefix("onerec "))
        warn_of_one_process()
        words = list(sys.argv[1:] if args is None else args)
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if "--config" in words:
            place = words.index("--config") + 1
            if place == len(words):
                self.error("--config needs a YAML file: a path, or the name of a config of onerec_hf.")
            words[place] = config_path(words[place])
        *found, from_file, from_line = self.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
        if left := [*from_file, *from_line]:
            unknown = [word for word in left if word.startswith("--")] or left
            known = [name for action in self._actions for name in action.option_strings]
            nearest = [match for word in unknown for match in get_close_matches(word, known, 1)]
            near = f" Near to that: {', '.join(nearest)}." if nearest else ""
            raise ValueError(
                f"there are no arguments {unknown}: `{self.prog} --help` lists those that there are.{near}"
            )
        return tuple(found)


__all__ = ["CONFIGS", "ScriptParser", "config_path", "warn_of_one_process"]
