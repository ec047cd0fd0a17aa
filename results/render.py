"""Writes the tables of the documentation, and the model cards, from results/*.json: no number is typed twice.

    python results/render.py          # or `make results`

Markdown pages say where a record belongs. What stands between a marker and its end is replaced:

    <!-- record: beauty -->    the commands, the table, and a line with seeds, hardware and date
    <!-- table: beauty -->     the table alone
    <!-- commands: beauty -->  the commands alone
    <!-- end -->

and, within a sentence or a table, one cell of a record by the beginning of its row and the name of its column:

    <!-- cell: beauty :: popularity :: recall@10 -->0.0114 / 0.0116<!-- end -->

results/README.md says what a record holds. A test fails while a page differs from what this command writes.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"(<!-- (record|table|commands): (\w+) -->\n).*?(<!-- end -->)", re.S)
CELL = re.compile(r"(<!-- cell: (\w+) :: (.+?) :: (.+?) -->).*?(<!-- end -->)")
REFERENCE = re.compile(r"\{(\w+)\|([^|}]+)\|([^|}]+)\}")


def load(name: str, folder: Path = ROOT / "results") -> dict[str, Any]:
    """The record `name`; a ValueError names the records that exist."""
    path = folder / f"{name}.json"
    if not path.is_file():
        known = sorted(path.stem for path in folder.glob("*.json"))
        raise ValueError(f"there is no record {path}: the records are {known}.")
    return json.loads(path.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    """The Markdown files that may hold markers."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def number(value: float, picture: str) -> str:
    """
    A number as the picture shows it: `0.00` two digits, `.00` no zero in front of the point, `+` always a sign, `0,`
    thousands. What follows the zeros, such as `%` or `x`, is the unit.
    """
    match = re.fullmatch(r"(\+?)(0?)(,?)(?:\.(0+))?([%x]?)", picture)
    if match is None:
        raise ValueError(f"{picture!r} is no picture of a number: write it like '0.00', '.0000', '+0.0%' or '0,'.")
    sign, zero, comma, decimals, unit = match.groups()
    text = f"{value:{sign}{comma}.{len(decimals or '')}f}"
    return (text if zero else re.sub(r"^([+-]?)0\.", r"\1.", text)) + unit


def cell(value: Any, picture: str) -> str:
    """A value of a record as text: a list is `left / right`, null a dash; see results/README.md."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return REFERENCE.sub(lambda found: lookup(*found.groups()), value)
    if isinstance(value, list):
        return " / ".join(cell(part, picture) for part in value)
    if not isinstance(value, dict):
        return number(value, picture)
    plain = picture.replace("+", "").rstrip("%x")
    if "low" in value:
        return f"[{number(value['low'], picture)}, {number(value['high'], picture)}]"
    text = number(value["mean"], picture)
    text = f"**{text}**" if value.get("bold") else text
    if "std" in value:
        text += f" ±{number(value['std'], plain)}"
    if "intervals" in value:
        text += f" ({', '.join(f'{number(low, plain)} to {number(high, plain)}' for low, high in value['intervals'])})"
    return text


def find_row(name: str, label: str, record: dict[str, Any]) -> list[Any]:
    """The one row whose first cell begins with `label`."""
    found = [row for row in record["rows"] if row[0].replace("**", "").startswith(label)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found) or 'no'} rows of the record {name!r} begin with {label!r}, one must: "
            f"{[row[0] for row in record['rows']]}"
        )
    return found[0]


def lookup(name: str, label: str, column: str) -> str:
    """
    The text of one cell of another record, without its bold, which is that table's own:
    `{beauty|SASRec, full softmax, 40|recall@10}`.
    """
    record = load(name)
    names = [each["name"] for each in record["columns"]]
    if column not in names:
        raise ValueError(f"the record {name!r} has no column {column!r}: {names}")
    index = names.index(column)
    return cell(find_row(name, label, record)[index], record["columns"][index].get("picture", "0")).replace("**", "")


def metrics(name: str, *labels: str) -> dict[str, tuple[dict[str, float], ...]]:
    """Rows of a record as model cards show them: name of the row -> (seen items kept, masked), each metric -> mean."""
    record, found = load(name), {}
    for label in labels:
        row = find_row(name, label, record)
        values = {column["name"]: own for column, own in zip(record["columns"], row) if "@" in column["name"]}
        sides = {
            key: [part["mean"] if isinstance(part, dict) else part for part in own] for key, own in values.items()
        }
        found[row[0].replace("**", "")] = tuple({key: own[side] for key, own in sides.items()} for side in (0, 1))
    return found


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    columns = record["columns"]
    lines = ["| " + " | ".join(column["name"] for column in columns) + " |", "|---" * len(columns) + "|"]
    for row in record["rows"]:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns: {row}")
        cells = [cell(value, column.get("picture", "0")) for value, column in zip(row, columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def commands(record: dict[str, Any]) -> str:
    """The commands as a block of bash."""
    return "```bash\n" + "\n".join(record["commands"]) + "\n```\n"


def origin(record: dict[str, Any]) -> str:
    """One line: seeds, hardware, date and commit."""
    seeds = record["seeds"]
    parts = [f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else "No randomness"]
    parts += [record["hardware"], record["date"]]
    if record["commit"]:
        parts.append(f"commit {record['commit']}")
    return f"*{'; '.join(parts)}.*\n"


def render(text: str) -> str:
    """The page with every marked place filled from its record."""

    def fill(match: re.Match) -> str:
        begin, kind, name, end = match.groups()
        record = load(name)
        parts = {"table": [table(record)], "commands": [commands(record)]}
        parts["record"] = [*([commands(record)] if record["commands"] else []), table(record), origin(record)]
        return begin + "\n".join(parts[kind]) + end

    text = CELL.sub(lambda found: found[1] + lookup(found[2], found[3], found[4]) + found[5], text)
    return MARKER.sub(fill, text)


def main() -> None:
    """Renders every page and every card in place."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (rendered := render(text)) != text:
            page.write_text(rendered, encoding="utf-8")
            print(page.relative_to(ROOT))
    import cards  # behind the pages: it needs torch and transformers

    cards.main()


if __name__ == "__main__":
    main()
