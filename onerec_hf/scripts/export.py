"""Exports a trained model: its two steps as graphs, the index of its items, and a search over both in plain NumPy.

    onerec export --repo org/onerec-1b --output outputs/exported
    python outputs/exported/search.py --history 1003 1007 --k 5

Writes `encode` and `decode` as `.pt2` (torch.export) and `.onnx`, `index.safetensors`, `export.json` and `search.py`,
which needs numpy, safetensors and onnxruntime alone. The ONNX files are compared with the model on onnxruntime before
the command ends.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..export import export_recommender
from ..recommender import Recommender
from .checks import check_output
from .parser import ScriptParser

WRITTEN = {"export.json", "index.safetensors", "search.py"} | {
    f"{step}.{kind}" for step in ("encode", "decode") for kind in ("pt2", "onnx", "onnx.data")
}


@dataclass
class ExportArguments:
    repo: str = field(metadata={"help": "Folder or Hub repository of a trained model."})
    output: str = field(metadata={"help": "Folder to write: a new one, or that of an earlier export."})
    onnx: bool = field(default=True, metadata={"help": "Whether ONNX files are written and compared, too."})


def main(args: ExportArguments) -> dict:
    """Exports; returns what `export.json` holds."""
    check_output(args.output, replaces=False)
    folder = Path(args.output)
    if folder.is_dir() and (others := sorted({path.name for path in folder.iterdir()} - WRITTEN)):
        raise ValueError(f"--output {folder} holds files {others[:5]} of another kind: name an empty folder.")
    recommender = Recommender.from_pretrained(args.repo, device="cpu")
    recommender.model.float()
    settings = export_recommender(recommender, folder, args.onnx)
    if recommender.ranker.reranker is not None:
        print("the re-ranker of the repository is not exported: items come in the order of the search.")
    return settings


def run(argv: list[str] | None = None) -> None:
    """`onerec export`; `argv`: its arguments, by default those of the command line."""
    (args,) = ScriptParser("export", __doc__, [ExportArguments]).parse(argv)
    settings = main(args)
    if "parity" in settings:
        print(json.dumps(settings["parity"], indent=2))
    print(f"-> {args.output}")


if __name__ == "__main__":
    run()
