"""Tables of numbers in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Print rows, name → column → value; turned on its side where it is wider than the terminal, and never cut off."""
    console = Console()
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    turned = {column: {name: row[column] for name, row in rows.items() if column in row} for column in columns}
    tables = [_laid_out(each) for each in (rows, turned)]
    widths = [console.measure(table, options=console.options.update(max_width=10_000)).maximum for table in tables]
    chosen = 0 if widths[0] <= max(console.width, widths[1]) else 1
    console.width = max(console.width, widths[chosen])  # numbers on a second line are better than half of each
    console.print(tables[chosen])


def _laid_out(rows: dict[str, dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table("", *columns)
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        table.add_row(name, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table
