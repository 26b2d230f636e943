"""What the pages quote is what the code says."""

import re
import shlex
from pathlib import Path

import pytest

from launch import submit
from tdkd_dist.recipe import load_config
from tools import compare_runs, plan_run, write_beton

ROOT = Path(__file__).resolve().parent.parent


def _code() -> str:
    """All of the package's source, with strings that are split over lines joined."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "tdkd_dist").rglob("*.py")))
    return re.sub(r'"\n\s*f?"', "", text)


def test_every_line_quoted_in_the_trouble_page_is_in_the_code():
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "trouble.md").read_text(), flags=re.MULTILINE)
    code = _code()
    assert len(rows) > 20
    assert [row for row in rows if row not in code] == []


def _commands(page: str) -> list[list[str]]:
    """The commands of a page, with its shell variable R filled in."""
    lines = [line.strip() for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("    ")]
    variable = next(line for line in lines if line.startswith("R="))[3:-1]
    return [shlex.split(line.replace("$R", variable), comments=True) for line in lines if line.startswith("python")]


@pytest.mark.parametrize("command", _commands("imagenet.md"), ids=" ".join)
def test_the_imagenet_pages_commands_are_understood(command, tmp_path, monkeypatch):
    _, script, *arguments = command
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "submit", lambda settings, dry_run: load_settings(settings))
    monkeypatch.setattr(submit, "manage", lambda action, runs: 0)
    if script == "launch/submit.py":
        assert submit.act(arguments) == 0
    else:
        for archive in arguments:
            if archive.endswith((".tar", ".tgz")):
                Path(archive).touch()
        {"tools/write_beton.py": write_beton, "tools/compare_runs.py": compare_runs, "tools/plan_run.py": plan_run}[
            script
        ].parse(arguments)


def load_settings(settings: list[str]) -> int:
    """Check a command's recipe and keys, and start nothing."""
    (recipe,) = [text.removeprefix("recipe=") for text in settings if text.startswith("recipe=")]
    load_config(recipe, [text for text in settings if not text.startswith("recipe=")])
    return 0
