"""Values on the screen: a table for people, or JSON. Shared by the commands."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show(values: dict[str, Any], as_json: bool) -> None:
    """Plain values as rows `name value`, nested names dotted; lists of dicts as tables below."""
    if as_json:
        print(json.dumps(values, indent=1, default=str))
        return
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None)
    for name, value in _flat({k: v for k, v in values.items() if not _is_rows(v)}):
        table.add_row(name, _cell(value))
    console.print(table)
    for name, rows in values.items():
        if _is_rows(rows):
            table = Table(*rows[0], title=name)
            for row in rows:
                table.add_row(*(_cell(value) for value in row.values()))
            console.print(table)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value)) or "none"
        return text if len(text) <= 80 else "\n".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows
