"""The report's pictures, as SVG text to be put into a page, or as files for a paper.

Shapes: S seeds, T timesteps, N images.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tdkd_dist.report.runs import Floats, Group

SIZE = (4.6, 3.3)
"""Inches: small enough that text stays legible when a phone shrinks the picture to its width."""
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tdkd-dist",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # a run's name may hold dollars
}


def accuracy_against_timestep(groups: Sequence[Group], file: Path | None = None) -> str:
    """Top-1 after t = 1..T: mean over seeds with a band of one standard deviation.

    A network trained for fewer timesteps than the others is a dot at the number it was trained for. `file` gets the
    picture too, in the format that its name ends with.
    """
    longest = max(group.config.student.num_timesteps for group in groups)
    with _figure() as (figure, axes):
        for i, group in enumerate(groups):
            curves_ST, trained = group.curves("top1"), group.config.student.num_timesteps
            mean_T, deviation_T = curves_ST.mean(0), curves_ST.std(0, ddof=1) if len(curves_ST) > 1 else None
            if trained < longest and trained <= len(mean_T):
                error = deviation_T[trained - 1] if deviation_T is not None else None
                label = f"{group.name} (trained at T = {trained})"
                axes.errorbar(
                    [trained], [mean_T[trained - 1]], error, color=_color(i), marker="o", capsize=3, ls="", label=label
                )
                continue
            timesteps = np.arange(1, len(mean_T) + 1)
            axes.plot(timesteps, mean_T, marker="o", ms=4, color=_color(i), label=group.name)
            if deviation_T is not None:
                axes.fill_between(timesteps, mean_T - deviation_T, mean_T + deviation_T, color=_color(i), alpha=0.15)
        axes.set(xlabel="timesteps at inference", ylabel="top-1, %")
        axes.set_xticks(range(1, max(group.curves("top1").shape[1] for group in groups) + 1))
        _legend_below(axes)
        if file is not None:
            figure.savefig(file, dpi=200)
        return _svg(figure)


def accuracy_against_average_timesteps(groups: Sequence[Group]) -> str | None:
    """Early exit: top-1 against the mean number of timesteps over all thresholds; dashed for the entropy rule."""
    with _figure() as (figure, axes):
        drawn = False
        for i, group in enumerate(groups):
            for rule, style in (("confidence", "-"), ("entropy", "--")):
                x, y = group.exit_curve(rule, "mean_timesteps"), group.exit_curve(rule, "top1")
                if x is not None and y is not None and group.curves("top1").shape[1] > 1:
                    label = group.name if rule == "confidence" else None
                    axes.plot(x, y, style, lw=1.3, color=_color(i), label=label)
                    drawn = True
        axes.set(xlabel="average timesteps under early exit", ylabel="top-1, %")
        _legend_below(axes)
        return _svg(figure) if drawn else None


def loss_trends(group: Group) -> str | None:
    """Training loss of the ensemble after each timestep against epochs; the group's first seed."""
    if not len(group.runs[0].losses):
        return None
    with _figure() as (figure, axes):
        _draw_trends(axes, group)
        return _svg(figure)


def save_loss_trends(groups: Sequence[Group], file: Path) -> None:
    """Those of all groups that have any side by side, in the format of the file's name (Fig. 3); of none no file."""
    known = [group for group in groups if len(group.runs[0].losses)]
    if not known:
        return
    size = 3.4 * len(known), SIZE[1]
    with _figure(size, columns=len(known), sharey=True, squeeze=False) as (figure, axes):
        for own, group in zip(axes[0], known, strict=True):
            _draw_trends(own, group)
            own.label_outer()
        figure.savefig(file, dpi=120)


def _draw_trends(axes: Any, group: Group) -> None:
    import matplotlib

    run = group.runs[0]
    # A run of less than an epoch is drawn against its steps.
    per_step = run.last["epoch"] / max(run.last["global_step"], 1) or 1.0
    T = run.config.student.num_timesteps
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, T))
    for t in range(1, T + 1):
        known = np.isfinite(run.losses[:, t])
        steps, losses = run.losses[known, 0], run.losses[known, t]
        axes.plot(steps * per_step, losses, lw=1.2, color=colors[t - 1], label=f"t = {t}")
    axes.set(xlabel="epoch" if run.last["epoch"] else "step", ylabel="cross-entropy of the ensemble", title=group.name)
    axes.title.set_fontsize(10)
    axes.legend()


def energy_against_timestep(groups: Sequence[Group]) -> str | None:
    """Energy an image up to t, log scale, with the ReLU network of the same shape as a dotted line."""
    measured = [(i, g, c) for i, g in enumerate(groups) if (c := g.curves("energy_mj")).size]
    if not measured:
        return None
    with _figure() as (figure, axes):
        for i, group, curves_ST in measured:
            mean_T = curves_ST.mean(0)
            axes.plot(range(1, len(mean_T) + 1), mean_T, marker="o", ms=4, color=_color(i), label=group.name)
        relu = {round(e, 9) for _, g, _ in measured if (e := g.runs[0].last.get("val/energy_mj_relu")) is not None}
        for value in relu:
            axes.axhline(value, ls=":", color="0.3", label="ReLU network, one pass")
        axes.set(xlabel="timesteps at inference", ylabel="mJ an image", yscale="log")
        axes.set_xticks(range(1, max(c.shape[1] for _, _, c in measured) + 1))
        _legend_below(axes)
        return _svg(figure)


def firing_rates(groups: Sequence[Group]) -> str | None:
    """Firing rate of every neuron layer from the input on, averaged over timesteps; the group's first seed."""
    measured = [
        (i, g, rates) for i, g in enumerate(groups) if (rates := (g.runs[0].validation or {}).get("firing_rates"))
    ]
    if not measured:
        return None
    with _figure() as (figure, axes):
        for i, group, rates in measured:
            means = [float(np.mean(over_t)) for over_t in rates.values()]
            axes.plot(range(1, len(means) + 1), means, marker=".", lw=1, color=_color(i), label=group.name)
        axes.set(xlabel="neuron layer", ylabel="spikes a neuron and timestep", ylim=(0, None))
        _legend_below(axes)
        return _svg(figure)


def embedding(title: str, points_N2: Floats, labels_N: Any) -> str:
    """A t-SNE embedding, coloured by class."""
    with _figure((3.2, 3.0)) as (figure, axes):
        _draw_embedding(axes, title, points_N2, labels_N)
        return _svg(figure)


def save_embeddings(found: Mapping[str, tuple[Mapping[int, Floats], Any]], file: Path) -> None:
    """The embeddings by timestep, and labels, of each group's name: a row a group, a column a timestep (Fig. 4)."""
    timesteps = sorted({t for embeddings, _ in found.values() for t in embeddings})
    size = 2.6 * len(timesteps), 2.6 * len(found)
    with _figure(size, rows=len(found), columns=len(timesteps), squeeze=False) as (figure, axes):
        for row, (name, (embeddings, labels_N)) in zip(axes, found.items(), strict=True):
            for own, t in zip(row, timesteps, strict=True):
                if t in embeddings:
                    _draw_embedding(own, f"{name}, t = {t}", embeddings[t], labels_N)
                else:
                    own.set_axis_off()
        figure.savefig(file, dpi=110)


def _draw_embedding(axes: Any, title: str, points_N2: Floats, labels_N: Any) -> None:
    axes.scatter(points_N2[:, 0], points_N2[:, 1], c=labels_N, cmap="tab10", s=4, linewidths=0)
    axes.set(xticks=[], yticks=[], title=title)
    axes.title.set_fontsize(9)
    axes.grid(False)


@contextmanager
def _figure(
    size: tuple[float, float] = SIZE, *, rows: int = 1, columns: int = 1, **settings: bool
) -> Iterator[tuple[Any, Any]]:
    """A figure with its axes in the report's style, closed at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **settings)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def _color(i: int) -> str:
    return f"C{i % 10}"


def _legend_below(axes: Any) -> None:
    """Beneath the axes, where it hides no curve however many there are."""
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1, fontsize=8.5)


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
