"""Count what the tests check, so that making them faster can't quietly make them fewer.

    python tools/bench/count_assertions.py [--root CHECKOUT]

Counted in the source of `tests/`: `assert` statements, expected errors and warnings (`pytest.raises`, `pytest.warns`),
and calls of comparisons that raise by themselves (`assert_close`, `assert_allclose`, ...). And what pytest collects.
"""

import argparse
import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

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


def main() -> int:
    """Print a line a kind, and the number of collected tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="count this checkout")
    root = parser.parse_args().root
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
