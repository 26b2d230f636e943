"""Write docs/keys.md, every key of the configuration: python tools/key_reference.py [--check]

Read from the schema's source, so that it needs nothing installed: annotation, default, limits and docstring.
Exit status: 0 written (or up to date), 1 docs/keys.md is stale (with --check).
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = [ROOT / "tdkd_dist" / f"{name}.py" for name in ("config", "loss_config", "launcher_config", "neuron_config")]
PAGE = ROOT / "docs" / "keys.md"
COMMAND = "python tools/key_reference.py"
FILES = ", ".join(f"`{path.name}`" for path in SCHEMA)
HEAD = f"""# Every key

Written by `{COMMAND}` from the docstrings in `tdkd_dist/`, those of
{FILES}; edit them there.
A recipe sets a key in its section (`train: {{epochs: 3}}`), the command line as `train.epochs=3`; `null` is None.
"""


class Key(NamedTuple):
    """One row of the page."""

    name: str
    default: str
    allowed: str
    meaning: str


def main(argv: list[str]) -> int:
    """Write the page, or say whether it is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if docs/keys.md is stale")
    if not parser.parse_args(argv).check:
        PAGE.write_text(render(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != render():
        print(f"docs/keys.md is stale: {COMMAND}", file=sys.stderr)
        return 1
    return 0


def render() -> str:
    """The page's text."""
    tree = [node for path in SCHEMA for node in ast.parse(path.read_text(encoding="utf-8")).body]
    names = {n.targets[0].id: n.value for n in tree if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    parts = [HEAD]
    for section in (node for node in tree if isinstance(node, ast.ClassDef)):
        title = _section(section)
        if title is None:
            continue
        parts.append(f"\n## {title}\n\n{_cell(ast.get_docstring(section) or '')}\n")
        parts.append("\n| key | default | may be | what it does |\n|---|---|---|---|\n")
        parts += [f"| `{title}.{k.name}` | {k.default} | {k.allowed} | {k.meaning} |\n" for k in _keys(section, names)]
    return "".join(parts)


def _section(node: ast.ClassDef) -> str | None:
    """How its keys start: the class variable `section`."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == "section":
            assert isinstance(item.value, ast.Constant)
            return str(item.value.value)
    return None


def _keys(section: ast.ClassDef, names: dict[str, ast.expr]) -> list[Key]:
    keys = []
    for item, after in zip(section.body, [*section.body[1:], ast.Pass()], strict=True):
        if not isinstance(item, ast.AnnAssign) or ast.unparse(item.annotation).startswith("ClassVar"):
            continue
        if _is_section(item):
            continue
        assert item.value is not None
        meaning = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            meaning = _cell(str(after.value.value))
        default, limits = _default(item.value, names)
        allowed = _type(item.annotation) + (f", {limits}" if limits else "")
        keys.append(Key(ast.unparse(item.target), default, allowed, meaning))
    return keys


def _is_section(item: ast.AnnAssign) -> bool:
    """Whether the field holds a section of its own, such as `student.neuron`."""
    return ast.unparse(item.annotation).endswith("Config")


def _default(value: ast.expr, names: dict[str, ast.expr]) -> tuple[str, str]:
    """The default, and the limits where the field has them."""
    limits = ""
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func)
        if called == "limited":
            most = [k.value for k in value.keywords if k.arg == "most"]
            limits = f"`{ast.literal_eval(value.args[1])}`" + (f", at most {_evaluate(most[0]):,}" if most else "")
            value = value.args[0]
        else:
            factory = {k.arg: ast.unparse(k.value) for k in value.keywords}["default_factory"]
            return f"`{ {'list': '[]', 'dict': '{}'}[factory] }`".replace(" ", ""), limits
    if isinstance(value, ast.Name):
        value = names[value.id]
    shown = _evaluate(value)
    return ("None" if shown is None else f'`"{shown}"`' if shown == "" else f"`{shown}`"), limits


def _evaluate(value: ast.expr) -> Any:
    """An arithmetic expression of our own schema."""
    return eval(compile(ast.Expression(value), "schema", "eval"), {"__builtins__": {}})


def _type(annotation: ast.expr) -> str:
    """The annotation, a Literal's choices spelled out."""
    if isinstance(annotation, ast.BinOp):
        return f"{_type(annotation.left)} or {_type(annotation.right)}"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        choices = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return ", ".join(f"`{ast.literal_eval(choice)}`" for choice in choices)
    return ast.unparse(annotation)


def _cell(text: str) -> str:
    """A docstring as one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
