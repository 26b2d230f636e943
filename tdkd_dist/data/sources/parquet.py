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


class ParquetSource:
    """Parquet shards with a picture's bytes in `image.bytes` (or `image`) and an integer `label`."""

    kind = "parquet"
    lossless = False

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files = path, list(files)
        self._group: tuple[tuple[int, int], Any] | None = None

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
        columns = [_parquet(file).read(columns=["label"], use_threads=False)["label"].to_numpy() for file in self.files]
        return np.concatenate(columns).astype(np.int64)

    @cached_property
    def class_names(self) -> list[str] | None:
        """Synsets from the pictures' names, else the names in the schema's metadata, where there are any."""
        if self._names is not None and (synsets := synsets_of(self._names, self.labels)):
            return synsets
        metadata = _parquet(self.files[0]).schema_arrow.metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = features.get("label", {}).get("names")
        return list(names) if names else None

    @cached_property
    def _names(self) -> list[str] | None:
        if "image.path" not in _columns(self.files[0]):
            return None
        tables = [_parquet(file).read(columns=["image.path"], use_threads=False)["image"] for file in self.files]
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
            column = "image.bytes" if "image.bytes" in _columns(self.files[file]) else "image"
            table = _parquet(self.files[file]).read_row_group(group, columns=[column], use_threads=False)
            self._group = (file, group), table["image"]
        value = self._group[1][row].as_py()
        return decode_image(value["bytes"] if isinstance(value, dict) else value, self.name(index))

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
    if "label" not in parquet.schema_arrow.names or "image" not in parquet.schema_arrow.names:
        raise Mistake(f"{file}: its columns are {', '.join(parquet.schema_arrow.names)}; image and label are needed")
    return parquet


def _columns(file: Path) -> list[str]:
    schema = _parquet(file).schema
    return [schema.column(i).path for i in range(len(schema))]
