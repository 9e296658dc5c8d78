"""A plan on the screen: does it fit, how long does it take, what binds, what else fits."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
WIDTH = 100  # columns that the widest table needs
_MEMORY = {
    "weights": "float32 masters",
    "grads": "float32",
    "optimizer": "two moments",
    "ema": "averages",
    "gathered": "weights that are computed with",
    "activations": "what backward needs of one micro-batch",
    "communication": "buffers",
    "update": "what moving the averages needs",
    "fragments": "allowance for the allocator, and what CUDA takes",
}


def show(values: Mapping[str, Any], *, name: str) -> None:
    """values: as `planned.of` gives them."""
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(WIDTH, console.width)
    title = f"{name} on {values['ranks']} {values['device']}"
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    table.add_column(style="bold")
    for row in (*_head(values), *_time(values)):
        table.add_row(*row)
    console.print(table)
    console.print(_memory(values))
    console.print(_stages(values))
    if values["communication"]:
        console.print(_communication(values["communication"]))
    for line in _proposals(console, values):
        console.print(line)
    for warning in values["warnings"]:
        console.print(f"[bold]warning[/bold] {warning}")


def _scaled(value: float, units: Iterable[tuple[float, str]] = _UNITS) -> str:
    for size, sign in units:
        if abs(value) >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{_scaled(value)}B"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _head(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    total = _scaled(values["params_total"], _COUNTS)
    if values["params_experts"]:
        active, experts = (
            _scaled(values[key], _COUNTS) for key in ("params_active", "params_experts")
        )
        yield "parameters", f"{total}, {active} active, {experts} in routed experts"
    else:
        yield "parameters", total
    forward = f"{_scaled(values['macs_forward'])}MAC an image as published"
    if values["macs_forward_merged"] != values["macs_forward"]:
        forward += f", {_scaled(values['macs_forward_merged'])}MAC merged"
    yield "forward", forward
    run, executed = values["flops_run"], values["flops_executed_per_image"]
    yield (
        "training",
        f"{_scaled(values['flops_train_per_image'])}FLOP an image ({_scaled(executed)}FLOP as "
        f"executed), {_scaled(run)}FLOP the run",
    )
    if values.get("tuning_share"):
        share = f"{100 * values['tuning_share']:.2g} % of the run"
        yield "tuning", f"{_scaled(values['flops_tuning'])}FLOP, {share}"
    axes = ", ".join(f"{name} {size}" for name, size in values["mesh"].items() if size > 1)
    how = f"{values['engine']}, {values['precision']}, remat {values['remat']}"
    yield "layout", f"{how}{'; ' * bool(axes)}{axes}"
    each = (
        f"{values['micro_batch']} images a rank and micro-batch, {values['accum']} of these a step"
    )
    yield "batch", each


def _time(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values["step_seconds"] is None:
        yield "step", "not predicted"
        yield "why", values["hours_basis"]
        return
    computing = _seconds(values["compute_seconds"])
    sending = _seconds(values["communication_seconds"])
    yield "step", f"{_seconds(values['step_seconds'])}: computing {computing}, sending {sending}"
    bound = values["resource"]
    yield "bound by", bound if bound == "compute" else f"{bound}, most of it {values['binding']}"
    rate = f"{values['images_per_s']:,.0f} images/s"
    if values["mfu"] is not None:
        bound = f"{100 * values['mfu_bound']:.1f} % if sending took nothing"
        rate += f", MFU {100 * values['mfu']:.1f} % ({bound})"
    yield "rate", rate
    if values["break_even"] is None:
        yield "break-even", "at no batch does computing take longest"
    elif values["break_even"] > 0:
        yield "break-even", f"{values['break_even']:.0f} images a rank and step"
    cost = "" if values["cost"] is None else f", costs {values['cost']:,.2f}"
    yield "run", f"{values['hours']:,.1f} h, {values['gpu_hours']:,.0f} GPU hours{cost}"
    yield "basis", values["hours_basis"]


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
    return table


def _memory(values: Mapping[str, Any]) -> Table:
    held = values["per_rank"]
    fits = values.get("fits_memory")
    verdict = "" if fits is None else ": fits" if fits else ": DOES NOT FIT"
    table = _table(f"\nmemory of a rank at its fullest, {_bytes(held['total'])}{verdict}", "", "")
    table.add_column("")
    for name, what in _MEMORY.items():
        if held[name]:
            whole = name == "grads" and values["accum"] > 1
            what += ", whole: micro-batches add them up" * whole
            table.add_row(name, _bytes(held[name]), what)
    if held["host"]:
        table.add_row("host", _bytes(held["host"]), "in CPU memory, not in the sum")
    return table


def _stages(values: Mapping[str, Any]) -> Table:
    took = {part["stage"]: part for part in values["compute"]}
    columns = ["stage", "blocks", "tokens", "width", "params", "MACs", "kept"]
    routed = any(row["moe_layers"] for row in values["stages"])
    columns += ["sent", "tok/expert"] if routed else []
    columns += ["time", "bound by"] if took else []
    table = _table(
        "\nstages (MACs and sent: an image; kept: a micro-batch; time: a step)", *columns
    )
    for row in values["stages"]:
        cells = [row["name"], *(str(row[key] or "") for key in ("blocks", "tokens", "width"))]
        cells += [_scaled(row["params"], _COUNTS), _scaled(row["macs"]), _bytes(row["activations"])]
        if routed:
            cells += [_bytes(row["all_to_all_bytes"]), f"{row['tokens_per_expert']:,.0f}"]
            if not row["moe_layers"]:
                cells[-2:] = ["", ""]
        cells += _took(took.get(row["name"])) if took else []
        table.add_row(*cells)
    if "update" in took:
        table.add_row("update", *[""] * (len(columns) - 3), *_took(took["update"]))
    return table


def _took(part: Mapping[str, Any] | None) -> list[str]:
    if part is None:
        return ["", ""]
    kinds = {name: part[name] for name in ("products", "depthwise", "memory")}
    return [_seconds(sum(kinds.values())), max(kinds, key=lambda name: kinds[name])]


def _communication(rows: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "\nsent in a step, by a rank", "what", "axis", "ranks", "over", "bytes", "time", left=2
    )
    for row in rows:
        over = "node" if row["inside_node"] else "network"
        rate = f"{over} {row['gb_per_s']:.0f} GB/s"
        cells = (str(row["ranks"]), rate, _bytes(row["bytes"]), _seconds(row["seconds"]))
        table.add_row(row["what"], row["axis"], *cells)
    return table


def _proposals(console: Console, values: Mapping[str, Any]) -> Iterator[Any]:
    if values.get("nothing_fits"):
        yield f"\n[bold]{values['nothing_fits']}[/bold]"
    if not values.get("proposals"):
        return
    tried, fit = values["layouts_tried"], values["layouts_fit"]
    title = f"\nlayouts that fit: {fit} of {tried} tried, best first"
    table = _table(title, "step", "MFU", "memory", "images", "even at", "bound by", left=0)
    table.add_column("overrides")
    for one in values["proposals"]:
        step, mfu, even = one["step_seconds"], one["mfu"], one["break_even"]
        table.add_row(
            "" if step is None else _seconds(step),
            "" if mfu is None else f"{100 * mfu:.1f} %",
            _bytes(one["memory"]),
            str(one["micro_batch"]),
            "" if even is None else f"{even:.0f}",
            one["resource"] or "",
            one["words"],
        )
    yield table
