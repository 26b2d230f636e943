"""Compare runs: python tools/compare_runs.py RUN... [--html FILE] [--figure FILE] [--wandb ENTITY/PROJECT].

RUN is a run folder, such as runs/fashion_sew. Prints accuracy after every timestep as a Markdown table; the first run's
group is the one that others are compared with. --html writes a page that needs no network, --wandb builds a W&B report.
"""

import argparse
import sys
from pathlib import Path

from tdkd_dist.command_line import Parser, run_tool
from tdkd_dist.mistakes import Mistake, Mistakes, printable
from tdkd_dist.report import figures, tables
from tdkd_dist.report.page import embeddings_of, write_page
from tdkd_dist.report.runs import Group, check_comparable, group_runs, load_runs


def main(argv: list[str]) -> int:
    """Compare; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: compare(parse(argv)), "compare_runs")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the comparison as one HTML file")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw accuracy against timesteps: .png, .pdf, .svg")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="loss_trends.png and tsne.png, for a paper")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="build a W&B report there")
    parser.add_argument(
        "--tsne", type=int, default=1000, metavar="IMAGES", help="for t-SNE in the page; 0: leave it out"
    )
    args = parser.parse_args(argv)
    found = Mistakes()
    found.require(args.wandb is None or args.wandb.count("/") == 1, f"--wandb {args.wandb}: must be ENTITY/PROJECT")
    drawn = args.figure is None or args.figure.suffix in (".png", ".pdf", ".svg")
    found.require(drawn, f"--figure {args.figure}: its name must end with .png, .pdf or .svg")
    found.require(args.tsne >= 0, f"--tsne {args.tsne}: must not be negative (0: leave it out)")
    found.tell()
    return args


def compare(args: argparse.Namespace) -> None:
    """Print the tables and write what was asked for; `Mistake` at the end with the runs that are damaged."""
    broken = Mistakes()
    runs, notes = load_runs(args.runs, broken)
    check_comparable(runs)
    notes += [f"{run.folder}: {run.state}" for run in runs if not run.finished]
    groups = group_runs(runs)
    say(tables.markdown(tables.accuracy_table(groups)))
    paired = tables.paired_table(groups) if len(groups) > 1 else []
    if len(paired) > 1:
        say("\n" + tables.markdown(paired))
    exits = tables.exit_table(groups)
    if exits is not None:
        say("\nwhen stopping by the rule of eval.exit\n\n" + tables.markdown(exits))
    for note in notes:
        say(note)
    notes += [f"left out: {line}" for line in broken.lines]
    if args.figure is not None:
        try:
            figures.accuracy_against_timestep(groups, args.figure)
        except OSError as error:
            raise Mistake(f"--figure {args.figure}: cannot be written ({error.strerror})") from error
        say(f"figure: {args.figure}")
    if args.figures is not None:
        save_figures(args.figures, groups, args.tsne)
    if args.wandb is not None:
        from tdkd_dist.report import wandb_report

        entity, project = args.wandb.split("/")
        beside = args.html.with_suffix(".wandb.json") if args.html else Path("comparison.wandb.json")
        line = wandb_report.send_or_keep(wandb_report.build(groups, notes, entity, project), beside)
        say(line)
        notes.append(line)
    if args.html is not None:
        write_page(args.html, groups, notes, tsne_images=args.tsne, say=say)
        say(f"page: {args.html}")
    broken.tell()


def save_figures(folder: Path, groups: list[Group], images: int) -> None:
    """Training losses side by side, and t-SNE. Raises `Mistake` if they can't be written."""
    found, left_out = embeddings_of(groups, images, say)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures.save_loss_trends(groups, folder / "loss_trends.png")
        if found:
            figures.save_embeddings(found, folder / "tsne.png")
    except OSError as error:
        raise Mistake(f"--figures {folder}: cannot be written ({error.strerror})") from error
    say("\n".join([f"figures: {folder}", *left_out]))


def say(text: str) -> None:
    """Print names and paths that are not ours."""
    print(printable(text), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
