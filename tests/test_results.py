"""The tables of the documentation are what results/*.json say, and the records are complete."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "results").glob("*.json"))


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render_results", ROOT / "results" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_command_writes(render):
    for page in render.pages():
        text = page.read_text(encoding="utf-8")
        assert render.render(text) == text, f"{page.relative_to(ROOT)} is out of date: run `python results/render.py`"


def test_a_number_changed_by_hand_is_found(render):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ".0757 / .0842" in text
    assert render.render(text.replace(".0757 / .0842", ".0758 / .0842")) == text


def test_every_record_is_shown_and_every_marker_has_its_end(render):
    shown = set()
    for page in render.pages():
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- end -->") == len(re.findall(r"<!-- (?:record|table|commands|cell): ", text)), page
        shown |= {name for _, kind, name, _ in render.MARKER.findall(text) if kind != "commands"}
    assert shown == {path.stem for path in RECORDS}


def test_the_plan_on_paper_is_what_the_other_records_say():
    spec = importlib.util.spec_from_file_location("billion_events", ROOT / "benchmarks" / "billion_events.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = json.loads((ROOT / "results" / "billion_events.json").read_text(encoding="utf-8"))
    assert record["rows"] == [[*row[:-1], pytest.approx(row[-1])] for row in module.steps()]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_how_it_was_made(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    expected = {"title", "commands", "seeds", "hardware", "date", "commit", "columns", "rows"}
    assert set(record) == expected and record["title"] and record["hardware"] and record["rows"]
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", record["date"])
    names = [column["name"] for column in record["columns"]]
    assert len(set(names)) == len(names) == len(record["rows"][0])
    scripts = re.findall(r"(?:recipes|benchmarks|experiments)/\w+\.py", " ".join(record["commands"]))
    assert all((ROOT / script).is_file() for script in scripts), scripts


@pytest.mark.parametrize(
    "value, picture, text",
    [
        (0.0757, "0.0000", "0.0757"),
        (-0.041, "+.0000", "-.0410"),
        (0.5, "+.00", "+.50"),
        (12.6, "0.0x", "12.6x"),
        (20756, "0,", "20,756"),
        (None, "0.0", "–"),
        ("as it is", "0.0", "as it is"),
        ([0.1, None], "0.00", "0.10 / –"),
        ({"mean": 21.1, "std": 11.0, "bold": True}, "+0.0%", "**+21.1%** ±11.0"),
        ({"low": -0.0378, "high": 0.0331}, "+.0000", "[-.0378, +.0331]"),
        ({"mean": 11.3, "intervals": [[5.5, 16.7], [-6.4, 17.3]]}, "+0.0", "+11.3 (5.5 to 16.7, -6.4 to 17.3)"),
    ],
)
def test_cells(render, value, picture, text):
    assert render.cell(value, picture) == text


def test_references_and_what_is_refused(render):
    assert render.cell("ours {beauty|OneRec-V2, 0.83M|recall@10}", "0") == "ours .0748 ±.0004 / .0856 ±.0010"
    sasrec = render.cell("{sports|SASRec, full softmax, weight|recall@10}", "0")
    assert sasrec == ".0479 ±.0006 / .0510 ±.0006"  # bold in its own table
    assert render.metrics("beauty", "popularity")["popularity"][1]["recall@10"] == 0.0116  # seen items masked
    with pytest.raises(ValueError, match=r"there is no record .*nothing.json: the records are \['ab_test', "):
        render.load("nothing")
    with pytest.raises(ValueError, match="no rows of the record 'beauty' begin with 'GRU4Rec', one must"):
        render.metrics("beauty", "GRU4Rec")
    with pytest.raises(ValueError, match="3 rows of the record 'beauty' begin with 'SASRec', one must"):
        render.metrics("beauty", "SASRec")  # which of them is it?
    with pytest.raises(ValueError, match="has no column 'hits'"):
        render.lookup("beauty", "popularity", "hits")
    with pytest.raises(ValueError, match="is no picture of a number"):
        render.number(1.0, "%d")
    with pytest.raises(ValueError, match="a row has 1 cells for 2 columns"):
        render.table({"columns": [{"name": "a"}, {"name": "b"}], "rows": [["x"]]})
