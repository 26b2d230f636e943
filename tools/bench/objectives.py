"""Run a recipe in variants and seeds, and fill the tables of which objective wins at which timestep.

    python tools/bench/objectives.py RECIPE WORK --variants all,sce_skl,mix [--seeds 0,1,2] [key=value ...]
        [--csv docs/results/objectives.csv] [--page docs/results/objectives.md] [--against all,sce_skl]

Variants are those of `recipes/variants/`; the first is run with all seeds, then the second: those that decide first.
One row of the CSV is one run, at its last epoch. A run whose row is there is not run again, whatever became of its
folder, WORK/RECIPE/VARIANT-seedN; one that was stopped goes on. The tables are written between the page's marks
`<!-- objectives: RECIPE -->` and `<!-- end -->`, and are made of the rows alone. Exit status 1: a run failed.
"""

import argparse
import csv
import io
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from tdkd_dist.command_line import Parser, check_output, cut_page, run_tool
from tdkd_dist.files import write_text
from tdkd_dist.mistakes import Mistakes, require
from tdkd_dist.recipe import load_config
from tdkd_dist.report.runs import Floats, paired
from tdkd_dist.report.tables import Rows, markdown, plus_minus, show_difference
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.log import format_seconds
from tdkd_dist.run.reading import read_json

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "results"
COLUMNS = ("recipe", "variant", "seed", "settings", "top1", "minutes", "commit", "date")
"""Of a row: `top1` after t = 1..T, in per cent; `settings` are the other keys; `minutes` of the last start."""
Row = dict[str, str]
Curves = dict[str, dict[int, Floats]]
"""Top-1 after t = 1..T by variant and seed."""


def main(argv: list[str]) -> int:
    """Run what is missing; the exit status: 0 done, 1 a run failed, 2 a user's mistake, told in one line."""
    return run_tool(lambda: campaign(parse(argv)), "objectives")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("work", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for all runs")
    parser.add_argument("--variants", required=True, type=lambda text: text.split(","))
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: text.split(","))
    parser.add_argument("--against", default="all,sce_skl", type=lambda text: text.split(","), help="of paired tables")
    parser.add_argument("--csv", type=Path, default=RESULTS / "objectives.csv")
    parser.add_argument("--page", type=Path, help="a Markdown page with the marks")
    args = parser.parse_intermixed_args(argv)
    for option, values in (("--variants", args.variants), ("--seeds", args.seeds)):
        require("" not in values, f"{option} {','.join(values)}: a name is empty")
    check_output(args.csv, "--csv")
    if args.page is not None:
        cut_page(args.page, *marks(args.recipe))
    return args


def campaign(args: argparse.Namespace) -> int:
    """Run what is missing, and write rows and tables after each run. Raises `Mistake` before the first."""
    wanted = [(variant, seed) for variant in args.variants for seed in args.seeds]
    found = Mistakes()
    for variant, seed in wanted:
        with found.gathered():
            load_config(args.recipe, [f"variant={variant}", f"run.seed={seed}", *args.settings])
    found.tell()
    if args.page is not None:
        refuse_to_lose(args)
    done = {(row["variant"], row["seed"]) for row in own_rows(args)}
    missing = [member for member in wanted if member not in done]
    failed, took = [], []
    for variant, seed in missing:
        began = time.monotonic()
        row = run(args, variant, seed)
        took.append(time.monotonic() - began)
        if row is None:
            failed.append(f"{variant}-seed{seed}")
            continue
        add_row(args.csv, row | {"minutes": f"{took[-1] / 60:.1f}"})
        write_tables(args)
        left = format_seconds(sum(took) / len(took) * (len(missing) - len(took)))
        print(f"{variant}, seed {seed}: top-1 {row['top1']} %; {len(took)} of {len(missing)}, {left} left", flush=True)
    write_tables(args)
    print(tables(args))
    print("failed: " + ", ".join(failed) if failed else f"rows: {args.csv}")
    return 1 if failed else 0


def refuse_to_lose(args: argparse.Namespace) -> None:
    """Raise `Mistake` where the page's tables would lose the rows of other settings."""
    others = {r["settings"] for r in read_rows(args.csv) if r["recipe"] == args.recipe} - {" ".join(args.settings)}
    shown = " or with ".join(sorted(other or "no settings" for other in others))
    require(
        not others,
        f"--page {args.page}: {args.csv} has rows of {args.recipe} with {shown}, which its tables would lose:"
        " give those settings, or a --csv of your own and no --page",
    )


def run(args: argparse.Namespace, variant: str, seed: str) -> Row | None:
    """Train one member, or take what it has come to; its row, None if it failed."""
    name = f"{variant}-seed{seed}"
    folder = RunFolder(args.work.absolute() / args.recipe / name)
    own = [f"recipe={args.recipe}", f"variant={variant}", f"run.seed={seed}", f"run.name={name}"]
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *own, f"run.dir={folder.path}", *args.settings]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        return None
    summary = read_json(folder.summary_file, top1=list)
    environment = read_json(folder.path / "environment.json", git=str | None)
    assert summary is not None, folder.path
    return {
        "recipe": args.recipe,
        "variant": variant,
        "seed": seed,
        "settings": " ".join(args.settings),
        "top1": " ".join(f"{value:.2f}" for value in summary["top1"]),
        "commit": str((environment or {}).get("git"))[:7],
        "date": time.strftime("%Y-%m-%d"),
    }


def own_rows(args: argparse.Namespace) -> list[Row]:
    """The rows of this recipe in these settings."""
    return [r for r in read_rows(args.csv) if (r["recipe"], r["settings"]) == (args.recipe, " ".join(args.settings))]


def read_rows(path: Path) -> list[Row]:
    """All rows of the file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    require(all(set(row) == set(COLUMNS) for row in rows), f"{path}: its columns must be {', '.join(COLUMNS)}")
    return rows


def add_row(path: Path, row: Row) -> None:
    """Add a row, and sort."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        sorted([*read_rows(path), row], key=lambda r: (r["recipe"], r["settings"], r["variant"], r["seed"]))
    )
    write_text(path, text.getvalue())


def curves(rows: list[Row]) -> Curves:
    """What the rows say."""
    found: Curves = defaultdict(dict)
    for row in rows:
        found[row["variant"]][int(row["seed"])] = np.array([float(value) for value in row["top1"].split()])
    return found


def tables(args: argparse.Namespace) -> str:
    """Accuracy after every timestep, and paired differences to each reference, as Markdown."""
    found = curves(own_rows(args))
    parts = [markdown(accuracy_table(found))] if found else []
    for reference in args.against:
        rows = paired_rows(found, reference) if reference in found else []
        parts += [markdown(rows)] if len(rows) > 1 else []
    return "\n\n".join(parts)


def accuracy_table(found: Curves) -> Rows:
    """Mean and standard deviation over seeds; most seeds first, then the best mean over t: fewer seeds compare ill."""
    T = max(len(curve) for by_seed in found.values() for curve in by_seed.values())
    rows = [["variant", "seeds", *(f"t = {t}" for t in range(1, T + 1)), "mean over t", "t = 1 minus T"]]
    means = {variant: np.array(list(by_seed.values())) for variant, by_seed in found.items()}
    for variant, curves_ST in sorted(means.items(), key=lambda item: (-len(item[1]), -item[1].mean())):
        cells = [plus_minus(curves_ST[:, t]) if t < curves_ST.shape[1] else "" for t in range(T)]
        gap = plus_minus(curves_ST[:, 0] - curves_ST[:, -1]) if curves_ST.shape[1] > 1 else ""
        rows.append([f"`{variant}`", str(len(curves_ST)), *cells, plus_minus(curves_ST.mean(1)), gap])
    return rows


def paired_rows(found: Curves, reference: str) -> Rows:
    """Each variant minus the reference, seed by seed; where T differs, at the timesteps that both have."""
    T = max(len(curve) for curve in found[reference].values())
    rows = [[f"minus `{reference}`", "seeds", *(f"t = {t}" for t in range(1, T + 1))]]
    for variant, by_seed in found.items():
        gaps = paired(by_seed, found[reference]) if variant != reference else []
        if gaps:
            cells = [show_difference(gap) for gap in gaps]
            rows.append([f"`{variant}`", str(gaps[0].seeds), *cells, *[""] * (T - len(cells))])
    return rows


def write_tables(args: argparse.Namespace) -> None:
    """Put the tables between the page's marks."""
    if args.page is not None:
        before, _, after = cut_page(args.page, *marks(args.recipe))
        write_text(args.page, f"{before}{tables(args)}\n{after}")


def marks(recipe: str) -> tuple[str, str]:
    """Before and after a recipe's tables."""
    return f"<!-- objectives: {recipe} -->\n", "<!-- end -->"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
