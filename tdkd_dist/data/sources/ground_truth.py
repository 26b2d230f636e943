"""What ILSVRC2012's validation pictures show: the labels come in a file of their own, in several forms."""

import csv
import io
import tarfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tdkd_dist.data.sources.classes import SYNSET
from tdkd_dist.data.sources.source import one_line
from tdkd_dist.mistakes import Mistake


def read_truth(path: Path, names: Sequence[str]) -> list[str]:
    """The synset of each of ILSVRC2012's validation pictures, whose `names` are sorted. Raises `Mistake`."""
    if path.name.endswith(".csv"):
        with open(path, newline="") as file:
            table = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        missing = [name for name in names if name not in table]
        if missing:
            raise Mistake(f"{path}: {len(missing)} pictures are not in it, such as {missing[0]}")
        return [table[name] for name in names]
    synsets = path.read_text().split() if path.is_file() and path.suffix == ".txt" else _read_devkit(path)
    if len(synsets) != len(names):
        raise Mistake(f"{path}: {len(synsets)} labels for {len(names)} pictures")
    wrong = [s for s in synsets if not SYNSET.fullmatch(s)]
    if wrong:
        raise Mistake(f"{path}: {wrong[0]} is not a synset such as n01440764")
    return synsets


def _read_devkit(path: Path) -> list[str]:
    """ILSVRC2012's devkit: the ground truth as its own class numbers, and the table from these to synsets."""
    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    found: dict[str, bytes] = {}
    if path.is_dir():
        found = {name: p.read_bytes() for name in wanted for p in path.rglob(name)}
    else:
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member) if Path(member.name).name in wanted else None
                    if file is not None:
                        found[Path(member.name).name] = file.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise Mistake(f"{path}: {one_line(error)}") from error
    if len(found) != len(wanted):
        raise Mistake(f"{path}: not ILSVRC2012's devkit: {' and '.join(wanted)} are needed")
    rows = _loadmat(path)(io.BytesIO(found["meta.mat"]), squeeze_me=True, struct_as_record=True)["synsets"]
    synset_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    return [synset_of[int(number)] for number in found["ILSVRC2012_validation_ground_truth.txt"].split()]


def _loadmat(path: Path) -> Any:
    try:
        return import_module("scipy.io").loadmat
    except ImportError as error:
        raise Mistake(f"{path}: reading the devkit needs scipy; or give a list of synsets instead") from error


def find_truth(folder: Path) -> Path:
    """The labels that lie in `folder`. Raises `Mistake` if none do."""
    candidates = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "LOC_val_solution.csv")
    for name in (*candidates, "imagenet_2012_validation_synset_labels.txt"):
        if (folder / name).exists():
            return folder / name
    raise Mistake(
        f"{folder}: no labels for these pictures; say --labels with the devkit, a synset list or Kaggle's csv"
    )
