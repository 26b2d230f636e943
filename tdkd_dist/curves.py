"""Curves over timesteps: lists for t = 1..T, which the record spells `top1_t1`, `top1_t2`, ..."""

from collections.abc import Iterable, Mapping
from typing import Any


def key_at(name: str, t: int) -> str:
    """The record's key for a curve's value after t timesteps."""
    return f"{name}_t{t}"


def flatten_curves(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row of the record: each curve spelt out, numbers as they are; dicts, which belong in no row, are left out."""
    row: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, list):
            row |= {prefix + key_at(name, t): v for t, v in enumerate(value, start=1)}
        elif not isinstance(value, dict):
            row[prefix + name] = value
    return row


def read_curve(row: Mapping[str, Any], name: str) -> list[float]:
    """A curve of a row, as far as it goes; empty if the row has none."""
    values: list[float] = []
    while (key := key_at(name, len(values) + 1)) in row:
        values.append(row[key])
    return values


def format_curve(values: Iterable[float]) -> str:
    """`87.94 88.69 ...`."""
    return " ".join(f"{value:.2f}" for value in values)
