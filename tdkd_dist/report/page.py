"""The comparison as one HTML file that needs nothing else: text, tables and SVG, put together by `page.html`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tdkd_dist.files import write_text
from tdkd_dist.mistakes import Mistake, printable
from tdkd_dist.report import figures, tables
from tdkd_dist.report.features import Labels, embed
from tdkd_dist.report.runs import Floats, Group


def write_page(
    path: Path, groups: list[Group], notes: Sequence[str], *, tsne_images: int, say: Callable[[str], None]
) -> None:
    """Write the comparison to `path`. `notes` are shown at its head; `tsne_images` = 0 leaves out t-SNE."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tdkd_dist", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found, left_out = embeddings_of(groups, tsne_images, say)
    embeddings = [
        (figures.embedding(f"{name}, t = {t}", points, labels), "")
        for name, (by_timestep, labels) in found.items()
        for t, points in by_timestep.items()
    ]
    text = environment.get_template("page.html").render(
        groups=groups,
        notes=notes,
        tables=tables,
        figures=figures,
        accuracy=tables.accuracy_table(groups),
        measured=_measured(groups),
        trends=[(svg, "") for group in groups if (svg := figures.loss_trends(group))],
        tsne_images=tsne_images,
        embeddings=embeddings,
        left_out=left_out,
    )
    try:
        write_text(path, printable(text.strip()) + "\n")
    except OSError as error:
        raise Mistake(f"--html {path}: cannot be written ({error.strerror})") from error


def _measured(groups: list[Group]) -> list[tuple[str | None, str]]:
    """Figures of what a validation measures, None where no run has, and their captions."""
    return [
        (
            figures.accuracy_against_average_timesteps(groups),
            "Early exit: solid, confidence at least θ; dashed, normalised entropy at most θ; every θ shown.",
        ),
        (
            figures.energy_against_timestep(groups),
            "Energy an image up to t at 45 nm: 4.6 pJ a MAC, 0.9 pJ an accumulate; batch norm folded, neuron updates"
            " left out; early images of the set.",
        ),
        (figures.firing_rates(groups), "Firing rate of each neuron layer, from the input on; first seed."),
    ]


def embeddings_of(
    groups: list[Group], images: int, say: Callable[[str], None]
) -> tuple[dict[str, tuple[dict[int, Floats], Labels]], list[str]]:
    """t-SNE by timestep, and labels, of each group's first seed, and a line for each group of which there is none."""
    found, left_out = {}, []
    for k, group in enumerate(groups if images else [], start=1):
        say(f"t-SNE of {group.name} ({k} of {len(groups)})")
        try:
            found[group.name] = embed(group.runs[0], images)
        except (Mistake, ImportError) as error:
            left_out.append(f"{group.name}: {error}")
    return found, left_out
