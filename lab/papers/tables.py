"""The tables of an experiment's results: CSV files as lists of dicts, {column: number or text}."""
import csv
import io
import math
from pathlib import Path

from runtime import checkpoint

# never numbers, even where they look like one
TEXTS = ("arm", "key", "commit", "torch", "device", "size")


def read_table(path):
    """Rows of a CSV file as dicts, numbers as numbers, empty cells left out; [] if there is no
    file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: plain_value(name, text) for name, text in row.items() if text}
                for row in csv.DictReader(file)]


def plain_value(name, text):
    """A cell as a whole number, a float or a text."""
    if name in TEXTS:
        return text
    try:
        number = float(text)
    except ValueError:
        return text
    whole = number.is_integer() and abs(number) < 2**53 and "." not in text
    return int(number) if whole else number


def write_table(path, rows, columns):
    """Writes a CSV file atomically; floats to seven digits."""
    def text(value):
        if value is None or isinstance(value, float) and math.isnan(value):
            return ""
        return f"{value:.7g}" if isinstance(value, float) else value

    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({c: text(row.get(c)) for c in columns} for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(path, buffer.getvalue())
