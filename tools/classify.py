"""Classify pictures with a student, stopping when it is sure: python tools/classify.py STUDENT PICTURE ...

    python tools/classify.py runs/x/student.safetensors cat.jpg                  top 5, after all timesteps
    python tools/classify.py runs/x/student.safetensors *.jpg --exit exit.json   a table; as few timesteps as it needs
    python tools/classify.py runs/x/student.safetensors cat.jpg --json           one JSON object a picture

A picture that cannot be read is a line of its own; the others are answered, and the exit status is 2.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tdkd_dist.command_line import Parser, check_input, check_timesteps, run_tool
from tdkd_dist.memory import keep_freed_memory
from tdkd_dist.mistakes import Mistake, Mistakes, printable, require

TOP = 5
BATCH = 64


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    return run_tool(lambda: classify(argv))


def classify(argv: list[str]) -> int:
    """Answer for each picture. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--exit", type=Path, metavar="RULE.json", help="when to stop; else all timesteps are run")
    parser.add_argument("--timesteps", type=int, metavar="T", help="at most so many")
    parser.add_argument("--json", action="store_true", help="one JSON object a picture")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    found = Mistakes()
    found.gather(check_input, args.student)
    found.gather(check_input, args.exit)
    found.gather(check_timesteps, args.timesteps)
    found.tell()
    keep_freed_memory()
    answers, broken = answer(args)
    if args.json:
        print("\n".join(json.dumps(row) for row in answers))
    elif len(answers) == 1:
        print(describe(answers[0]))
    elif answers:
        print(table(answers))
    for line in broken:
        print(f"error: {printable(line)}", file=sys.stderr)
    return 2 if broken else 0


def answer(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """What the student says of each picture, and a line for each that cannot be read."""
    from tdkd_dist.anytime import AnytimeStudent, read_picture

    student = AnytimeStudent.load(args.student, args.exit, num_timesteps=args.timesteps, device=args.device)
    require(student.frames is None, f"{args.student}: reads event-camera recordings, no pictures")
    names = student.class_names
    answers: list[dict[str, Any]] = []
    broken: list[str] = []
    for start in range(0, len(args.pictures), BATCH):
        shown: list[Any] = []
        paths: list[Path] = []
        for path in args.pictures[start : start + BATCH]:
            try:
                shown.append(read_picture(path, student.image_size, student.crop_pct))
                paths.append(path)
            except Mistake as mistake:
                broken.append(str(mistake))
        if not shown:
            continue
        import torch

        found = student(torch.stack(shown))
        best_BK = found.logits.softmax(-1).topk(min(TOP, found.logits.shape[1]))
        for k, path in enumerate(paths):
            top = [
                {"class": c, "name": names[c] if names and c < len(names) else str(c), "probability": round(p, 6)}
                for c, p in zip(best_BK.indices[k].tolist(), best_BK.values[k].tolist(), strict=True)
            ]
            answers.append({"picture": str(path), "timesteps": int(found.timesteps[k]), "top": top})
    return answers, broken


def describe(row: dict[str, Any]) -> str:
    """One picture in a line."""
    top = ", ".join(f"{entry['name']} {100 * entry['probability']:.1f} %" for entry in row["top"])
    return printable(f"{row['picture']}: {top} ({row['timesteps']} timestep{'s' if row['timesteps'] > 1 else ''})")


def table(rows: list[dict[str, Any]]) -> str:
    """Several pictures, a line each."""
    cells = [("picture", "class", "confidence", "timesteps", "then")]
    for row in rows:
        first, *rest = row["top"]
        then = ", ".join(f"{entry['name']} {100 * entry['probability']:.0f} %" for entry in rest[:2])
        confidence = f"{100 * first['probability']:.1f} %"
        cells.append((row["picture"], first["name"], confidence, str(row["timesteps"]), then))
    widths = [max(len(printable(row[k])) for row in cells) for k in range(len(cells[0]))]
    lines = ["  ".join(printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
