"""The tables of methods in README.md and docs/evidence.md, of what quality.py has found.

    python benchmarks/method_tables.py

A test holds the documents against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal

from quality import EQUAL_TIME, METHODS
from results import markdown, read_rows

TASKS = {
    "sst2": "SST-2",
    "copa": "COPA",
    "rte": "RTE",
    "cb": "CB",
    "wsc": "WSC",
    "boolq": "BoolQ",
    "multirc": "MultiRC",
    "squad": "SQuAD",
    "drop": "DROP",
}
MEAN = "mean of nine"
LABELS = {
    "zero-shot": "nothing",
    "dominant": "the dominant layer, 11 (`dominant`)",
    "dominant mlp": "its MLP (`dominant`, `--part mlp`)",
    "mezo": "all parameters (`mezo`)",
    "lozo": "all, by low rank (`lozo`)",
    "lora": "LoRA on all layers (`lora`)",
}
Cells = Mapping[tuple[str, str], tuple[str, str]]  # by method and column: a number, what follows


def nine_tasks() -> list[dict[str, str]]:
    """Test accuracy, or F1, of the methods; the best of a column is bold."""
    rows = read_rows(METHODS)
    cells = {
        (row["method"], row["task"]): (
            rounded(row["mean"]),
            row["stdev"] and f" ± {rounded(row['stdev'])}",
        )
        for row in rows
    }
    metrics = {row["task"]: row["metric"] for row in rows}
    heads = {name: f"{TASKS[name]}{', F1' * (metrics[name] == 'test_f1')}" for name in TASKS}
    return side_by_side(cells, heads | {MEAN: "mean"}, max)


def equal_time() -> list[dict[str, str]]:
    """Mean validation loss in the time of the dominant layer's run, and the steps done by then."""
    rows = read_rows(EQUAL_TIME)
    cells = {
        (row["method"], row["task"]): (
            rounded(row["loss"]),
            f" ({row['steps_done']})",
        )
        for row in rows
    }
    seconds = {row["task"]: row["seconds"] for row in rows}
    heads = {name: f"{TASKS[name]}, {seconds[name]} s" for name in TASKS}
    return side_by_side(cells, heads, min)


def side_by_side(
    cells: Cells, heads: Mapping[str, str], best_of: Callable[[Iterable[float]], float]
) -> list[dict[str, str]]:
    """A row for each method, a column for each head; the best number of a column is bold."""
    table = [{"what is tuned": label} for label in LABELS.values()]
    for column, head in heads.items():
        shown = {method: cells.get((method, column), ("", "")) for method in LABELS}
        best = best_of(float(number) for number, _ in shown.values() if number)
        for row, (number, rest) in zip(table, shown.values(), strict=True):
            row[head] = f"**{number}**{rest}" if number and float(number) == best else number + rest
    return [row for row in table if any(list(row.values())[1:])]


def rounded(number: str) -> str:
    """To three places, halves up: results of runs have four."""
    return str(Decimal(number).quantize(Decimal("0.001"), ROUND_HALF_UP))


if __name__ == "__main__":
    print(f"{markdown(nine_tasks())}\n\n{markdown(equal_time())}")
