"""What a command says where its arguments or files are wrong: the message of the error, without a traceback."""

import os
import sys
from pathlib import Path
from types import TracebackType

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_EXPLAINED = (ValueError, TypeError, OSError)  # raised with a message that says what to do


def show_short_errors(command: str) -> None:
    """From now on this process ends with `onerec COMMAND: message` where this package refuses something.

    What other packages raise keeps its traceback, and so does all else with `HF_DEBUG=1`, as in the command `hf`.
    """
    if os.environ.get("HF_DEBUG", "").lower() not in ("", "0", "false"):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        last = traceback
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        own = last is not None and last.tb_frame.f_code.co_filename.startswith(_PACKAGE)
        if own and isinstance(error, _EXPLAINED):
            print(f"onerec {command}: {error}\n(HF_DEBUG=1 shows where this was found.)", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


__all__ = ["show_short_errors"]
