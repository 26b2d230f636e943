"""Pictures of one run. Several runs side by side are `report`'s."""

from pathlib import Path

from tdkd_dist.files import whole

Point = tuple[float, float]
"""Mean timesteps and top-1 in per cent."""


def draw_early_exit(path: Path, fixed: list[float], curves: dict[str, list[Point]], chosen: Point) -> None:
    """What stopping early is worth: top-1 against the mean number of timesteps, as a PNG.

    `fixed` is the top-1 after t = 1..T for everybody, `curves` are thresholds' by name, `chosen` the calibrated rule.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*sorted(curve), strict=True), label=name, linewidth=1.5)
    axes.plot(range(1, len(fixed) + 1), fixed, "o", color="gray", label="the same t for all")
    axes.plot(*chosen, "*", color="black", markersize=13, label="calibrated on other pictures", zorder=3)
    axes.annotate(f"{chosen[1]:.2f} % at {chosen[0]:.2f}", chosen, textcoords="offset points", xytext=(8, -14))
    axes.annotate(f"{fixed[-1]:.2f} %", (len(fixed), fixed[-1]), textcoords="offset points", xytext=(0, 8), ha="right")
    axes.set(xlabel="timesteps at inference, mean over pictures", ylabel="top-1 accuracy, %")
    axes.set_xticks(range(1, len(fixed) + 1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    with whole(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)


def draw_accuracy_against_timestep(folder: Path, curves: dict[str, list[float]]) -> Path:
    """A line plot of top-1 (per cent) after t = 1..T timesteps, one line a name, as a PNG in `folder`; its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, top1 in curves.items():
        timesteps = range(1, len(top1) + 1)
        (line,) = axes.plot(timesteps, top1, marker="o", label=name)
        for t, value in zip(timesteps, top1, strict=True):
            axes.annotate(
                f"{value:.1f}",
                (t, value),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize=9,
                color=line.get_color(),
            )
    axes.set_xlabel("timesteps at inference")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_xticks(range(1, max(map(len, curves.values())) + 1))
    axes.margins(x=0.08)
    values = [value for top1 in curves.values() for value in top1]
    # At least ten points high, so that a nearly flat curve looks nearly flat.
    margin = max(5 - (max(values) - min(values)) / 2, 2)
    axes.set_ylim(max(min(values) - margin, 0), max(values) + margin)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path = folder / "accuracy_against_timestep.png"
    with whole(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
    return path
