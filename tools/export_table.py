"""Prove every student in every format, and show it in docs/export.md: python tools/export_table.py [STUDENT ...]

The tests do the same for a part of it, and hold the page to what they find.
"""

import sys
import tempfile
from pathlib import Path

from tdkd_dist.command_line import Parser, cut_page, run_tool
from tdkd_dist.files import write_text
from tdkd_dist.mistakes import require

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "export.md"
BEGIN, END = "<!-- proven: tools/export_table.py -->\n", "<!-- end -->"
CONNECTIONS = ("ADD", "AND", "IAND")
Row = tuple[str, str]
"""A student, with its connection where it has one, and the reset."""


def main(argv: list[str]) -> int:
    """Prove and write; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: fill(parse(argv)))


def parse(argv: list[str]) -> tuple[str, ...]:
    """The students of the command line, or all. Raises `Mistake`."""
    from tdkd_dist.students import spiking_names

    parser = Parser(__doc__)
    parser.add_argument("students", nargs="*", metavar="STUDENT", help="(default: all)")
    names = tuple(parser.parse_args(argv).students)
    for name in names:
        require(name in spiking_names(), f"{name}: no such student; choose from {', '.join(spiking_names())}")
    return names or spiking_names()


def fill(names: tuple[str, ...]) -> None:
    """Prove the rows of these students, and write them into the page's table. Raises `Mistake`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from exports import FORMATS, RESETS, lively, prove  # type: ignore[import-not-found]

    from tdkd_dist.neuron_config import NeuronConfig

    found = read_table()
    for name in names:
        for connect in CONNECTIONS if name in ("sew_resnet8", "sew_resnet50") else (None,):
            for reset, v_reset in RESETS.items():
                options = {} if connect is None else {"connect": connect}
                net = lively(name, NeuronConfig(v_reset=v_reset), **options)
                cells = []
                for form in FORMATS:
                    with tempfile.TemporaryDirectory() as folder:
                        cells.append(show(*prove(net, form, Path(folder) / "student.pt2")))
                row = f"{name} {connect}" if connect else name
                found[row, reset] = cells
                print(row, reset, *cells, flush=True)
                write_table(found, FORMATS)


def show(worst: float | None, note: str) -> str:
    """A cell: the worst difference of a logit in float64 and what it took, or why there is none."""
    if worst is None:
        return "soft reset" if "soft reset" in note else note
    return ("0" if worst == 0 else f"{worst:.0e}") + (f" `{note}`" if note else "")


def read_table() -> dict[Row, list[str]]:
    """The page's rows."""
    lines = cut_page(PAGE, BEGIN, END)[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(student.strip("`"), reset): cells for student, reset, *cells in rows}


def write_table(found: dict[Row, list[str]], formats: tuple[str, ...]) -> None:
    """Put the rows into the page, sorted."""
    lines = ["| student | reset | " + " | ".join(formats) + " |", "|---|---" + "|---" * len(formats) + "|"]
    lines += [f"| `{student}` | {reset} | " + " | ".join(cells) + " |" for (student, reset), cells in _sorted(found)]
    before, _, after = cut_page(PAGE, BEGIN, END)
    write_text(PAGE, before + "\n".join(lines) + "\n" + after)


def _sorted(found: dict[Row, list[str]]) -> list[tuple[Row, list[str]]]:
    def key(item: tuple[Row, list[str]]) -> tuple[str, int, str, str]:
        (student, reset), _ = item
        family, _, rest = student.rpartition("resnet")
        depth, _, connect = rest.partition(" ")
        return family, int(depth), connect, reset

    return sorted(found.items(), key=key)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
