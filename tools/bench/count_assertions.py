"""Count what the tests check, so that making them faster can't quietly make them fewer.

    python tools/bench/count_assertions.py [--root CHECKOUT]

Counted in the source of `tests/`: `assert` statements, expected errors and warnings (`pytest.raises`, `pytest.warns`),
and calls of comparisons that raise by themselves (`assert_close`, `assert_allclose`, ...). And what pytest collects.
"""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tdkd_dist.command_line import Parser, run_tool
from tdkd_dist.mistakes import require

ROOT = Path(__file__).resolve().parent.parent.parent


def kind_of(node: ast.AST) -> str | None:
    """Which kind of check a node is, if it is one."""
    if isinstance(node, ast.Assert):
        return "assert statements"
    if not isinstance(node, ast.Call):
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in ("raises", "warns"):
        return "expected errors and warnings"
    return "comparisons that raise" if name.startswith("assert_") else None


def main(argv: list[str]) -> int:
    """Count and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: count(argv))


def count(argv: list[str]) -> None:
    """Print a line a kind, and the number of collected tests. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="count this checkout")
    root = parser.parse_args(argv).root
    require((root / "tests").is_dir(), f"--root {root}: no folder tests is there")
    kinds = Counter(
        kind
        for path in (root / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (kind := kind_of(node)) is not None
    )
    for kind, count in sorted(kinds.items()):
        print(f"{kind}: {count}")
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-n0"]
    listed = subprocess.run(collect, cwd=root, capture_output=True, text=True)
    if listed.returncode != 0:  # a checkout from before pytest-xdist
        listed = subprocess.run(collect[:-1], cwd=root, capture_output=True, text=True, check=True)
    print("collected tests:", sum(int(line.rsplit(": ", 1)[1]) for line in listed.stdout.splitlines() if ": " in line))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
