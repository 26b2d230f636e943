"""The comparison as one HTML file that needs nothing else: text, tables and SVG."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from tdkd_dist.files import write_text
from tdkd_dist.mistakes import Mistake
from tdkd_dist.report import figures, tables
from tdkd_dist.report.features import embed
from tdkd_dist.report.runs import Group

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%; height: auto; max-width: 34rem; }
figcaption, .note { font-size: .88rem; color: #555; }
pre { overflow-x: auto; background: #f5f5f5; padding: .7rem; font-size: .8rem; }
"""


def write_page(
    path: Path, groups: list[Group], notes: Sequence[str], *, tsne_images: int, say: Callable[[str], None]
) -> None:
    """Write the comparison to `path`. `notes` are shown at its head; `tsne_images` = 0 leaves out t-SNE."""
    parts = [
        "<h1>"
        + html.escape(" against ".join(g.name for g in groups[:4]) + (" …" if len(groups) > 4 else ""))
        + "</h1>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        *_outcome(groups),
        *_exits(groups),
        *_training(groups),
        *_features(groups, tsne_images, say),
        *_cost(groups),
        *_provenance(groups),
    ]
    body = "\n".join(parts)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tdkd-dist: comparison of runs</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
    try:
        write_text(path, text)
    except OSError as error:
        raise Mistake(f"--html {path}: cannot be written ({error.strerror})") from error


def _outcome(groups: list[Group]) -> list[str]:
    first = groups[0].runs[0]
    accuracy = tables.accuracy_table(groups)
    parts = [
        "<h2>Accuracy after every timestep</h2>",
        f"<p>Top-1 in per cent of the ensemble after t timesteps, on {int(first.last['val/samples'])} images; last"
        " epoch; mean ± standard deviation over seeds.</p>",
        _gallery([(figures.accuracy_against_timestep(groups), "Mean over seeds, with a band of ± one deviation.")]),
        tables.as_html(accuracy),
    ]
    if len(groups) > 1:
        parts += ["<h2>What differs</h2>", tables.as_html(tables.differences_table(groups))]
        paired = tables.paired_table(groups)
        if len(paired) > 1:
            parts += [
                "<h2>Paired differences</h2>",
                "<p>Percentage points, seed by seed, with the 95 % confidence interval of their mean (Student's t)."
                " Under two standard errors, or with 0 in the interval, it is called not resolved.</p>",
                tables.as_html(paired),
            ]
    matrix = tables.matrix_table(groups)
    if matrix:
        parts += ["<h2>Trained at T, tested at t</h2>", tables.as_html(matrix)]
    parts += [
        "<h2>To paste</h2>",
        f"<p>Markdown</p><pre>{html.escape(tables.markdown(accuracy))}</pre>",
        f"<p>LaTeX (booktabs)</p><pre>{html.escape(tables.latex(accuracy))}</pre>",
    ]
    return parts


def _exits(groups: list[Group]) -> list[str]:
    curve = figures.accuracy_against_average_timesteps(groups)
    pictures = [
        (curve, "Early exit: solid, confidence at least θ; dashed, normalised entropy at most θ; every θ shown."),
        (figures.energy_against_timestep(groups), "Energy an image up to t at 45 nm: 4.6 pJ a MAC, 0.9 pJ an"
         " accumulate; batch norm folded, neuron updates left out; early images of the set."),
        (figures.firing_rates(groups), "Firing rate of each neuron layer, from the input on; first seed."),
    ]  # fmt: skip
    shown = [(svg, caption) for svg, caption in pictures if svg]
    if not shown:
        return []
    return [
        "<h2>Early exit, energy and firing rates</h2>",
        _gallery(shown),
        tables.as_html(tables.full_range_table(groups)),
    ]


def _training(groups: list[Group]) -> list[str]:
    pictures = [(svg, "") for group in groups if (svg := figures.loss_trends(group))]
    return ["<h2>Training loss after every timestep</h2>", _gallery(pictures)] if pictures else []


def _features(groups: list[Group], images: int, say: Callable[[str], None]) -> list[str]:
    if images == 0:
        return []
    pictures, left_out = [], []
    for k, group in enumerate(groups, start=1):
        say(f"t-SNE of {group.name} ({k} of {len(groups)})")
        try:
            embeddings, labels = embed(group.runs[0], images)
        except (Mistake, ImportError) as error:
            left_out.append(f"{group.name}: {error}")
            continue
        for t, points in embeddings.items():
            pictures.append((figures.embedding(f"{group.name}, t = {t}", points, labels), ""))
    notes = [f'<p class="note">t-SNE left out: {html.escape(line)}</p>' for line in left_out]
    caption = f"<p>t-SNE of the mean over steps ≤ t of the pooled features, {images} validation images, first seed.</p>"
    return ["<h2>Features</h2>", *([caption, _gallery(pictures)] if pictures else []), *notes]


def _cost(groups: list[Group]) -> list[str]:
    return ["<h2>Training cost</h2>", tables.as_html(tables.cost_table(groups))]


def _provenance(groups: list[Group]) -> list[str]:
    return ["<h2>Runs</h2>", tables.as_html(tables.runs_table(groups))]


def _gallery(pictures: Sequence[tuple[str | None, str]]) -> str:
    items = "".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for svg, caption in pictures
    )
    return f'<div class="figures">{items}</div>'
