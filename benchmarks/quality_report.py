"""The results of quality.py as Markdown tables and a plot."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

Record = dict[str, Any]
HIGHER_IS_BETTER = {"perplexity": False, "accuracy": True, "cosine": True}
EXPECTED = ("obs", "flap", "wanda_sp", "amp", "minitron", "llm_pruner", "magnitude")
MARK = "<!-- What follows is written by quality.py --report. -->"
COARSE = 0.01
HEAD = "# Quality of every recipe\n"
EXPLAINED = """\
Every figure is the mean over the seeds of the calibration data ± half the range. Bold: the best of a column and what its range
overlaps. In brackets: the share of parameters kept, where it is over one percent less than asked for."""


@dataclass(frozen=True)
class Cell:
    """What one recipe leaves at one share, over seeds."""

    figures: tuple[float, ...]
    kept: float
    higher: bool

    @property
    def losses(self) -> tuple[float, ...]:
        """The figures, so that less is better."""
        return tuple(-f for f in self.figures) if self.higher else self.figures

    def clearly_before(self, other: Cell) -> bool:
        """Is the worst of these better than the best of the other's?"""
        return max(self.losses) < min(other.losses)


@dataclass(frozen=True)
class Table:
    """The results of one model."""

    name: str
    metric: str
    dense: Record
    cells: dict[tuple[str, float], Cell]
    failed: dict[tuple[str, float], str]
    cost: dict[str, Record]

    @property
    def keeps(self) -> list[float]:
        return sorted({keep for _, keep in (*self.cells, *self.failed)}, reverse=True)

    @property
    def recipes(self) -> list[str]:
        """Those with results, the best mean rank first."""
        ranks: dict[str, list[int]] = defaultdict(list)
        for keep in self.keeps:
            for rank, name in enumerate(self.order(keep)):
                ranks[name].append(rank)
        return sorted(ranks, key=lambda name: mean(ranks[name]))

    def order(self, keep: float) -> list[str]:
        """The recipes at one share, best first."""
        here = [name for name, share in self.cells if share == keep]
        return sorted(here, key=lambda name: mean(self.cells[name, keep].losses))


def tables(records: Iterable[Record]) -> list[Table]:
    """One for every model whose dense figure is known."""
    by_model: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_model[record["model"]].append(record)
    return [_table_of(name, found) for name, found in by_model.items() if any("metric" in r for r in found)]


def _table_of(name: str, found: list[Record]) -> Table:
    dense = next(r for r in found if "metric" in r)
    groups: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in found:
        if record["keep"] is not None:
            groups[record["recipe"], record["keep"]].append(record)
    higher = HIGHER_IS_BETTER[dense["metric"]]
    failed = {key: r["failed"] for key, group in groups.items() for r in group if "failed" in r}
    cells = {
        key: Cell(tuple(r["quality"] for r in group), min(r["kept"] for r in group), higher)
        for key, group in groups.items()
        if key not in failed
    }
    cost = {r["recipe"]: r for r in found if r["keep"] is None and "seconds" in r and "metric" not in r}
    for recipe in {r["recipe"] for r in found}:
        ran = [r for r in found if r["recipe"] == recipe and r["keep"] is not None and "seconds" in r]
        if ran:
            whole = {"prune_seconds": mean(r["seconds"] for r in ran), "prune_mb": max(r["mb"] for r in ran)}
            cost[recipe] = {**cost.get(recipe, {}), **whole}
    return Table(name, dense["metric"], dense, cells, failed, cost)


def markdown(found: Sequence[Table]) -> str:
    """All tables."""
    parts = [EXPLAINED, *(part for table in found for part in (_quality(table), _reasons(table)) if part)]
    return "\n\n".join([*parts, _orders(found), _cost(found)]) + "\n"


def _shown(table: Table, figure: float) -> str:
    return (
        f"{figure:.1%}"
        if table.metric == "accuracy"
        else f"{figure:.3f}"
        if table.metric == "cosine"
        else f"{figure:.2f}"
    )


def _quality(table: Table) -> str:
    rows = [[name, *(_cell(table, name, keep) for keep in table.keeps)] for name in _all_recipes(table)]
    title = f"## {table.name}: {table.metric}, dense {_shown(table, table.dense['quality'])}"
    return title + "\n\n" + _grid(["recipe", *(f"{keep:.0%} kept" for keep in table.keeps)], rows)


def _all_recipes(table: Table) -> list[str]:
    return list(dict.fromkeys([*table.recipes, *(name for name, _ in table.failed)]))


def _cell(table: Table, name: str, keep: float) -> str:
    cell = table.cells.get((name, keep))
    if cell is None:
        return "raises" if (name, keep) in table.failed else ""
    spread = (max(cell.figures) - min(cell.figures)) / 2
    text = _shown(table, mean(cell.figures)) + (f" ± {_shown(table, spread)}" if len(cell.figures) > 1 else "")
    best = table.cells[table.order(keep)[0], keep]
    text = text if best.clearly_before(cell) else f"**{text}**"
    return text + (f" [{cell.kept:.0%}]" if keep - cell.kept > COARSE else "")


def _reasons(table: Table) -> str:
    """Which recipes raise, with the reason of the first share."""
    reasons: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (name, keep), reason in table.failed.items():
        reasons[name, reason].append(keep)
    return "\n".join(
        f"- {name} at {', '.join(f'{k:.0%}' for k in sorted(keeps, reverse=True))} raises {reason.replace('<', '&lt;')}"
        for (name, reason), keeps in reasons.items()
    )


def _orders(found: Sequence[Table]) -> str:
    """What was expected, what came out, and which pairs come out the other way round."""
    rows = []
    rounds: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for table in found:
        for keep in table.keeps:
            here = [name for name in table.order(keep) if name in EXPECTED]
            rows.append([table.name, f"{keep:.0%}", _chain(table, here, keep)])
            for first, second in combinations([name for name in EXPECTED if name in here], 2):
                rounds[first, second].append(table.cells[second, keep].clearly_before(table.cells[first, keep]))
    against = [[first, second, f"{sum(r)} of {len(r)}"] for (first, second), r in rounds.items() if any(r)]
    return "\n\n".join(
        [
            "## Against the expected order",
            f"Expected: {', '.join(EXPECTED)}. Found, best first; `~` where the ranges of neighbours overlap.",
            _grid(["model", "kept", "order"], rows),
            "Rows in which the second of a pair is clearly (ranges apart) better than the first, which was expected before it:",
            _grid(["expected first", "expected second", "other way round"], against),
        ]
    )


def _chain(table: Table, names: list[str], keep: float) -> str:
    text = names[0] if names else ""
    for before, name in zip(names, names[1:], strict=False):
        apart = table.cells[before, keep].clearly_before(table.cells[name, keep])
        text += (", " if apart else " ~ ") + name
    return text


def _cost(found: Sequence[Table]) -> str:
    """Seconds in forward passes over the calibration data, memory in weights."""
    parts = [
        "## Cost",
        "CPU seconds in units of one forward pass over the calibration data, peak memory beyond what was held before in units of the "
        "weights; scoring alone, and the whole of scoring, planning, cutting, checking and compensating (mean over seeds, of the "
        "first share; the highest peak). The first row is the model's own forward pass, the second forward and backward.",
    ]
    for table in found:
        second, weights = table.dense["seconds"], table.dense["weights_mb"]
        rows = [["forward", "1.00", f"{table.dense['mb'] / weights:.1f}", "", ""]]
        both = f"{table.dense['backward_seconds'] / second:.2f}"
        rows.append(["forward and backward", both, f"{table.dense['backward_mb'] / weights:.1f}", "", ""])
        for name in _all_recipes(table):
            spent = table.cost.get(name, {})
            units = {"seconds": second, "mb": weights, "prune_seconds": second, "prune_mb": weights}
            rows.append([name, *(f"{spent[k] / unit:.2f}" if k in spent else "" for k, unit in units.items())])
        title = f"{table.name}: a forward pass is {second:.2f} s, the weights are {weights:.1f} MB."
        parts += [title, _grid(["recipe", "score, time", "score, memory", "all, time", "all, memory"], rows)]
    return "\n\n".join(parts)


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(found: Sequence[Table], path: Path) -> None:
    """One picture for every model: the figure against the share kept, a line for each recipe, its range shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {name: f"C{k}" for k, name in enumerate(sorted({n for t in found for n in t.recipes}))}
    columns = min(3, len(found))
    size = (-(-len(found) // columns), columns)
    figure, pictures = pyplot.subplots(*size, figsize=(5 * columns, 4 * size[0]), squeeze=False, layout="constrained")
    for table, picture in zip(found, pictures.flat, strict=False):
        for name in table.recipes:
            keeps = [keep for keep in table.keeps if (name, keep) in table.cells]
            cells = [table.cells[name, keep].figures for keep in keeps]
            picture.plot(keeps, [mean(c) for c in cells], label=name, color=colours[name], marker=".")
            picture.fill_between(
                keeps, [min(c) for c in cells], [max(c) for c in cells], color=colours[name], alpha=0.2
            )
        picture.axhline(table.dense["quality"], color="black", linestyle=":", label="dense")
        scale = "log" if table.metric == "perplexity" else "linear"
        picture.set(title=table.name, xlabel="parameters kept", ylabel=table.metric, yscale=scale)
        picture.invert_xaxis()
    for picture in pictures.flat[len(found) :]:
        picture.axis("off")
    pictures.flat[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def write(path: Path, records: Iterable[Record]) -> None:
    """The report, below what was written by hand in the file there is, and the plot beside it."""
    found = tables(records)
    by_hand = path.read_text().partition(MARK)[0] if path.is_file() else HEAD + "\n"
    path.write_text(f"{by_hand}{MARK}\n\n{markdown(found)}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot, matplotlib isn't installed: pip install 'depgraph[plot]'")
    elif found:
        plot(found, path.with_suffix(".png"))
