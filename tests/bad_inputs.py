"""Every bad input that the suite tries, with the message it gets, as a page.

    python -m pytest -n 2 --dist loadfile -p tests.bad_inputs tests     # writes docs/bad_inputs.md

Each error that a test expects (`pytest.raises(..., match=...)`) is one row.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "bad_inputs.md"
_raises, _found, _test = pytest.raises, [], [""]


class _Recorded:
    """`pytest.raises` that remembers what was raised."""

    def __init__(self, context):
        self.context = context

    def __enter__(self):
        self.info = self.context.__enter__()
        return self.info

    def __exit__(self, *error):
        swallowed = self.context.__exit__(*error)
        if swallowed:
            _found.append((_test[0], type(error[1]).__name__, str(error[1])))
        return swallowed


def _recording(*args, match=None, **kwargs):
    context = _raises(*args, match=match, **kwargs)
    return context if match is None else _Recorded(context)


def pytest_configure(config):
    pytest.raises = _recording


def pytest_runtest_setup(item):
    _test[0] = item.nodeid.split("[")[0]


def pytest_sessionfinish(session):
    """Each worker leaves its part; the first process joins them."""
    worker = getattr(session.config, "workerinput", {}).get("workerid")
    folder = ROOT / ".pytest_cache"
    folder.mkdir(exist_ok=True)
    if worker is not None:
        (folder / f"bad_inputs_{worker}.json").write_text(json.dumps(_found), encoding="utf-8")
        return
    rows = list(_found)
    for part in sorted(folder.glob("bad_inputs_*.json")):
        rows += [tuple(row) for row in json.loads(part.read_text(encoding="utf-8"))]
        part.unlink()
    PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: list[tuple[str, str, str]]) -> str:
    """Markdown: one table per file of tests, one row per test and message."""
    by_file = defaultdict(dict)
    for test, kind, message in rows:
        file, _, name = test.partition("::")
        short = " ".join(re.sub(r"/\S*/pytest-of-\w+/pytest-\d+/(popen-\w+/)?[^/\s'\"]+", "FOLDER", message).split())
        short = re.sub(r"/tmp/\w+", "FOLDER", short).replace(str(ROOT), "CHECKOUT")
        short = short if len(short) <= 240 else short[:237] + "..."
        by_file[Path(file).stem][name, kind, short.replace("|", "\\|")] = True
    total = sum(len(own) for own in by_file.values())
    lines = [
        "# Bad inputs and their messages",
        "",
        f"{total} different errors that the tests provoke, as a user would, with what is said. "
        "Written by `python -m pytest -n 2 --dist loadfile -p tests.bad_inputs tests`; do not edit.",
    ]
    for file, own in sorted(by_file.items()):
        lines += [
            "",
            f"## {file.removeprefix('test_').replace('_', ' ')}",
            "",
            "| test | error | message |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name.removeprefix('test_').replace('_', ' ')} | {kind} | {text} |" for name, kind, text in sorted(own)
        ]
    return "\n".join(lines) + "\n"
