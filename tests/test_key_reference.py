"""docs/keys.md is what the schema says."""

from tdkd_dist.config import Config, flatten
from tools.key_reference import COMMAND, PAGE, render


def test_the_page_of_keys_is_what_the_schema_says():
    assert PAGE.read_text(encoding="utf-8") == render(), f"docs/keys.md is stale: {COMMAND}"


def test_every_key_has_its_row():
    rows = [line.split("`")[1] for line in render().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(flatten(Config()))


def test_every_key_says_what_it_does():
    assert [line for line in render().splitlines() if line.endswith("|  |")] == []
