"""Pictures of one run. Several runs side by side are `report`'s."""

from pathlib import Path

from tdkd_dist.files import whole


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
