"""What a command says where its arguments or files are wrong: the message of the error, without a traceback."""

import linecache
import os
import sys
from pathlib import Path
from types import TracebackType

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def show_short_errors(command: str) -> None:
    """From now on this process ends with `onerec COMMAND: message` where this package refuses something.

    What is not raised on purpose, or by other packages, keeps its traceback, and so does all else with `HF_DEBUG=1`,
    as in the command `hf`.
    """
    if os.environ.get("HF_DEBUG", "").lower() not in ("", "0", "false"):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        last = traceback
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if isinstance(error, Exception) and last is not None and _on_purpose(last):
            message = error.args[0] if isinstance(error, KeyError) else error  # whose text would be quoted
            print(f"onerec {command}: {message}\n(HF_DEBUG=1 shows where this was found.)", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


def _on_purpose(place: TracebackType) -> bool:
    """Whether a `raise` of this package stands there; its messages say what to do."""
    file = place.tb_frame.f_code.co_filename
    return file.startswith(_PACKAGE) and linecache.getline(file, place.tb_lineno).lstrip().startswith("raise ")


__all__ = ["show_short_errors"]
