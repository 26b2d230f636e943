"""Parquet shards of encoded pictures, as the public copies of ImageNet come; read with pyarrow."""

import json
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.sources.classes import synsets_of
from tdkd_dist.data.sources.source import Image, decode_image, fingerprint, one_line
from tdkd_dist.mistakes import Mistake

IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "fine_label", "labels")
"""What public copies call their columns, by preference."""


class ParquetSource:
    """Parquet shards with a column of pictures (encoded bytes, or a struct that has `bytes`) and one of labels.

    Which columns these are, the schema's metadata says (an Image, a ClassLabel), or else their usual names.
    """

    kind = "parquet"
    lossless = False

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files = path, list(files)
        self._group: tuple[tuple[int, int], Any] | None = None

    @cached_property
    def _columns(self) -> tuple[str, str]:
        """The names of the columns of pictures and of labels."""
        return _find_columns(self.files[0])

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """(file, row group, row in it) of every picture, [N, 3]."""
        rows = []
        for number, file in enumerate(self.files):
            metadata = _parquet(file).metadata
            for group in range(metadata.num_row_groups):
                count = metadata.row_group(group).num_rows
                rows.append(np.stack([np.full(count, number), np.full(count, group), np.arange(count)], axis=1))
        return np.concatenate(rows)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The label of every picture, [N]."""
        label = self._columns[1]
        columns = [_parquet(file).read(columns=[label], use_threads=False)[label].to_numpy() for file in self.files]
        found = np.concatenate(columns)
        if not np.issubdtype(found.dtype, np.integer):
            raise Mistake(f"{self.path}: its column {label} holds {found.dtype}, not an integer in every row")
        return found.astype(np.int64)

    @cached_property
    def class_names(self) -> list[str] | None:
        """Synsets from the pictures' names, else the names in the schema's metadata, where there are any."""
        if self._names is not None and (synsets := synsets_of(self._names, self.labels)):
            return synsets
        feature = _features(self.files[0]).get(self._columns[1])
        names = feature.get("names") if isinstance(feature, dict) else None
        return [str(name) for name in names] if isinstance(names, list) and names else None

    @cached_property
    def _names(self) -> list[str] | None:
        image = self._columns[0]
        if f"{image}.path" not in _leaves(self.files[0]):
            return None
        tables = [_parquet(file).read(columns=[f"{image}.path"], use_threads=False)[image] for file in self.files]
        return [str((row or {}).get("path")) for table in tables for row in table.to_pylist()]

    def name(self, index: int) -> str:
        """The shard, the row and, where there is one, the picture's name."""
        file, group, row = self._rows[index]
        name = f" ({self._names[index]})" if self._names else ""
        return f"{self.files[file]}[row group {group}, row {row}]{name}"

    def read(self, index: int) -> Image:
        """Picture `index`, [H, W, 3]."""
        file, group, row = (int(i) for i in self._rows[index])
        if self._group is None or self._group[0] != (file, group):
            image = self._columns[0]
            column = f"{image}.bytes" if f"{image}.bytes" in _leaves(self.files[file]) else image
            table = _parquet(self.files[file]).read_row_group(group, columns=[column], use_threads=False)
            self._group = (file, group), table[image]
        value = self._group[1][row].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise Mistake(f"{self.name(index)}: no encoded picture in it but {type(data).__name__}")
        return decode_image(data, self.name(index))

    def signature(self) -> str:
        """Hash of the files' names, sizes, beginnings and ends."""
        return fingerprint(self.files)


def _parquet(file: Path) -> Any:
    try:
        pyarrow = import_module("pyarrow")
        parquet_file = import_module("pyarrow.parquet").ParquetFile
    except ImportError as error:
        raise Mistake(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        parquet = parquet_file(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise Mistake(f"{file}: {one_line(error)}") from error
    return parquet


def _find_columns(file: Path) -> tuple[str, str]:
    names, features = _parquet(file).schema_arrow.names, _features(file)
    found = []
    for what, kind, usual in (("pictures", "Image", IMAGE_NAMES), ("labels", "ClassLabel", LABEL_NAMES)):
        declared = [n for n in names if isinstance(features.get(n), dict) and features[n].get("_type") == kind]
        candidates = declared or [name for name in usual if name in names]
        best = [name for name in usual if name in candidates] or candidates
        if not best or (len(best) > 1 and best[0] not in usual):
            among = f"{', '.join(best)} could be" if best else f"none of {', '.join(map(str, names))} is"
            raise Mistake(f"{file}: {among} its {what}; name the column {usual[0]}")
        found.append(best[0])
    return found[0], found[1]


def _features(file: Path) -> dict[str, Any]:
    """What the schema's metadata says of each column, as the datasets library writes it; empty if it says nothing."""
    metadata = _parquet(file).schema_arrow.metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _leaves(file: Path) -> list[str]:
    schema = _parquet(file).schema
    return [schema.column(i).path for i in range(len(schema))]
