"""docs/export.md, "export.md" of the site: its command exists, and what it says of the files is so."""

import re
import shlex
from pathlib import Path

from onerec_hf.export import numpy_search
from onerec_hf.export.folder import index_tensors
from onerec_hf.scripts.export import WRITTEN, ExportArguments
from onerec_hf.scripts.parser import ScriptParser

from ..tiny import tiny_catalogue

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def test_the_commands_are_those_of_the_scripts(monkeypatch, capsys):
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    install, command, search = block.strip().split("\n")
    assert install == "pip install 'onerec_hf[export]'" and command.startswith("onerec export ")
    (args,) = ScriptParser("export", None, [ExportArguments]).parse(shlex.split(command)[2:])
    words = shlex.split(search)
    assert words[:2] == ["python", f"{args.output}/search.py"]
    monkeypatch.setattr("sys.argv", [*words[1:], "--folder", "nowhere"])
    try:
        numpy_search.main()
    except FileNotFoundError as error:  # behind the arguments
        assert "nowhere" in str(error)


def test_every_file_and_tensor_has_its_row():
    named = set(re.findall(r"^\| (`.*?) \|", PAGE, re.M))
    files = {name for row in named for name in re.findall(r"`([\w.]+)`", row)}
    assert WRITTEN - files == {"encode.onnx.data", "decode.onnx.data"}
    tensors = {re.sub(r"_\d$", "_l", name) for name in index_tensors(tiny_catalogue(), [4, 12, 20])}
    assert tensors <= files
