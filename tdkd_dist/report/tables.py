"""The report's tables as rows of text, and rows of text as Markdown, LaTeX or HTML.

Shapes: S seeds, T timesteps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tdkd_dist.curves import key_at, read_curve
from tdkd_dist.report.runs import Group, PairedDifference, differences, paired_differences, spread

Rows = list[list[str]]
"""The head first."""


def runs_table(groups: Sequence[Group]) -> Rows:
    """Every run with how far it has come."""
    rows = [["group", "run", "seed", "state", "mean over t, %"]]
    for group in groups:
        for run in group.runs:
            mean = f"{run.last['val/top1_mean']:.2f}"
            rows.append([group.name, str(run.folder), str(run.config.run.seed), run.state, mean])
    return rows


def differences_table(groups: list[Group]) -> Rows:
    """The keys in which the groups' configurations differ."""
    return [["key", *(group.name for group in groups)]] + [
        [key, *(_value(value) for value in values)] for key, values in differences(groups).items()
    ]


def accuracy_table(groups: Sequence[Group]) -> Rows:
    """Top-1 (per cent) after every timestep of the last epoch, mean and standard deviation over seeds."""
    T = max(group.curves("top1").shape[1] for group in groups)
    rows = [["objective", "seeds", *(f"t = {t}" for t in range(1, T + 1)), "mean over t"]]
    for group in groups:
        curves_ST = group.curves("top1")
        cells = [plus_minus(curves_ST[:, t]) if t < curves_ST.shape[1] else "" for t in range(T)]
        rows.append([group.name, str(len(curves_ST)), *cells, plus_minus(curves_ST.mean(1))])
    return rows


def paired_table(groups: Sequence[Group]) -> Rows:
    """Each group's top-1 minus the first group's, paired by seed, with 95 % confidence intervals."""
    reference, *others = groups
    T = reference.curves("top1").shape[1]
    rows = [[f"minus {reference.name}", "seeds", *(f"t = {t}" for t in range(1, T + 1))]]
    for group in others:
        found = paired_differences(group, reference)
        if found:
            cells = [show_difference(d) for d in found]
            rows.append([group.name, str(found[0].seeds), *cells, *[""] * (T - len(cells))])
    return rows


def full_range_table(groups: Sequence[Group]) -> Rows:
    """What else the last validation says: calibration, the oracle's exit, activity, energy."""
    rows = [
        ["objective", "ECE at 1", "ECE at T", "first correct, timesteps", "never correct, %", "firing rate at T",
         "mJ at 1", "mJ at T", "mJ, ReLU network"]
    ]  # fmt: skip
    for group in groups:
        last = [run.last for run in group.runs]
        T = group.curves("top1").shape[1]
        keys = (key_at("ece", 1), key_at("ece", T), "first_correct_aet", "never_correct", key_at("firing_rate", T),
                key_at("energy_mj", 1), key_at("energy_mj", T), "energy_mj_relu")  # fmt: skip
        rows.append([group.name, *(_mean([row.get(f"val/{key}", math.nan) for row in last]) for key in keys)])
    return rows


def exit_table(groups: Sequence[Group]) -> Rows | None:
    """What stopping by the rule `eval.exit` is worth, over the seeds evaluated with one; None if there are none."""
    T = max(group.curves("top1").shape[1] for group in groups)
    columns: dict[str, tuple[str, Callable[[Sequence[float]], str]]] = {
        "top-1, %": ("top1", plus_minus),
        "mean t": ("mean_timesteps", plus_minus),
        **{f"stop at {t}, %": (key_at("share", t), plus_minus) for t in range(1, T + 1)},
        "mJ": ("energy_mj", _mean),
        **{f"AUROC, {kind}": (f"auroc_{kind}", _mean) for kind in ("confidence", "entropy", "margin")},
    }
    found = [[run.last for run in group.runs if "val/exit_top1" in run.last] for group in groups]
    columns = {
        name: column
        for name, column in columns.items()
        if any(f"val/exit_{column[0]}" in row for rows in found for row in rows)
    }
    if not columns:
        return None
    table = [["objective", "seeds", *columns, "top-1 at T, %"]]
    for group, rows in zip(groups, found, strict=True):
        if rows:
            values = [[row.get(f"val/exit_{key}", math.nan) for row in rows] for key, _ in columns.values()]
            shown = [show(v) for v, (_, show) in zip(values, columns.values(), strict=True)]
            at_T = plus_minus([read_curve(row, "val/top1")[-1] for row in rows])
            table.append([group.name, str(len(rows)), *shown, at_T])
    return table


def cost_table(groups: Sequence[Group]) -> Rows:
    """What an optimiser step costs, averaged over the record."""
    rows = [["objective", "ms a step", "images/s", "peak memory a rank, MiB", "waiting for data", "ranks", "machine"]]
    for group in groups:
        launcher = group.config.launcher
        cells = [
            _mean([run.mean_of(key) for run in group.runs], digits)
            for key, digits in (("step_ms", 0), ("images_per_s", 0), ("peak_memory_mib", 0), ("data_wait_share", 3))
        ]
        machine = "GPU" if launcher.gpus_per_node else "CPU"
        rows.append([group.name, *cells, str(launcher.world_size), machine])
    return rows


def matrix_table(groups: Sequence[Group]) -> Rows | None:
    """Trained at T (rows) x tested at t (columns), for groups that differ in T; None if all have the same."""
    if len({group.config.student.num_timesteps for group in groups}) < 2:
        return None
    T = max(group.curves("top1").shape[1] for group in groups)
    rows = [["trained at", "objective", *(f"tested at {t}" for t in range(1, T + 1))]]
    for group in sorted(groups, key=lambda g: g.config.student.num_timesteps):
        mean_T = group.curves("top1").mean(0)
        cells = [f"{value:.2f}" for value in mean_T] + [""] * (T - len(mean_T))
        rows.append([str(group.config.student.num_timesteps), group.name, *cells])
    return rows


def plus_minus(values_S: Any) -> str:
    """`88.31 ± 0.12`: mean and standard deviation; the value alone of one seed; nothing if one is unknown."""
    if np.isnan(values_S).any():
        return ""
    deviation = spread(np.asarray(values_S))
    return f"{np.mean(values_S):.2f}" + ("" if math.isnan(deviation) else f" ± {deviation:.2f}")


def markdown(rows: Rows) -> str:
    """A table for a README."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def latex(rows: Rows) -> str:
    """A table for a paper, with booktabs' rules."""
    escapes = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "±": r"$\pm$", "×": r"$\times$"}
    lines = [" & ".join("".join(escapes.get(c, c) for c in cell) for cell in row) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    body = "\n".join(lines[1:])
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{lines[0]}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}"


def show_difference(d: PairedDifference) -> str:
    """`-0.29 [-1.78, +1.19], not resolved`: mean and interval; the difference alone of one seed."""
    if d.seeds < 2:
        return f"{d.mean:+.2f}"
    verdict = "" if d.resolved else ", not resolved"
    return f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]{verdict}"


def _mean(values: Sequence[float], digits: int = 4) -> str:
    mean = float(np.mean(values))
    return "" if math.isnan(mean) else f"{mean:.{digits}g}" if digits == 4 else f"{mean:.{digits}f}"


def _value(value: Any) -> str:
    return "default" if value is None else str(value)
