"""Nonsense values of configuration keys, by the command line and in recipes."""

import random
from pathlib import Path

from tdkd_dist.config import Config, flatten
from tdkd_dist.recipe import load_all

VALUES = (
    *("inf", "-inf", "nan", "-1", "0", "1e308", "1e-300", "-5", "1000000000", "1e400", "true", "null"),
    *("9223372036854775807", "9223372036854775808", "''", "[]", "[nan,nan,nan]", "[1,2]", "{}", "{a: 1}"),
    *("..", "/", "/etc", "a/b", ".", "a\x1b[2Jb", "x" * 5000, "é\ud800", "\0"),
    *("${oc.env:HOME}", "${run.name}", "${nothing}", "${", "!!python/object:os.system", "&a", "*a"),
)


def one_key(draw: random.Random, folder: Path) -> None:
    """A recipe with one to three keys set to nonsense."""
    keys = [key for key in flatten(Config()) if key != "run.dir"]
    chosen = [f"{draw.choice(keys)}={draw.choice(VALUES)}" for _ in range(draw.randint(1, 3))]
    load_all([("fashion_sew", chosen)])


AREAS = {"settings": one_key}
