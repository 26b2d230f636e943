"""Validation counts over several ranks, against the whole set in one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from torch import nn

from tdkd_dist.config import DataConfig
from tdkd_dist.curves import flatten_curves
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.loaders import make_val_loader
from tdkd_dist.data.normalise import Normalise
from tdkd_dist.data.sources import open_source
from tdkd_dist.validate import validate

SAMPLES, CLASSES, TIMESTEPS = 203, 7, 3


class Fixed(nn.Module):
    """Logits [T, B, K] that depend on the picture's mean colours alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.double().mean((2, 3))
        steps = torch.arange(1, TIMESTEPS + 1, dtype=torch.float64).view(-1, 1, 1)
        classes = torch.arange(CLASSES, dtype=torch.float64)
        return torch.sin(steps * 100 * means.sum(-1, keepdim=True) + classes * means[:, :1] * 50)


def make_beton(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(SAMPLES):
        path = folder / "tree" / f"class{i % CLASSES}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    beton = folder / "val.beton"
    write(open_source(folder / "tree"), beton)
    return beton


def count(rank: int, world_size: int, beton: Path, out: Path) -> None:
    data = DataConfig(val=str(beton), image_size=8, crop_pct=1.0)
    device = torch.device("cpu")
    loader = make_val_loader(data, batch_size=32, rank=rank, world_size=world_size, device=device, workers=1)
    row = validate(Fixed(), loader, Normalise(data.mean, data.std), num_timesteps=TIMESTEPS, device=device)
    if rank == 0:
        out.write_text(json.dumps({**flatten_curves(row), **{k: v for k, v in row.items() if isinstance(v, dict)}}))


@pytest.mark.slow
def test_every_image_counts_once_at_any_world_size(tmp_path):
    beton = make_beton(tmp_path)
    rows = []
    for world_size in (1, 2, 3):
        run_ranks(count, world_size, beton, tmp_path / "row.json")
        rows.append(json.loads((tmp_path / "row.json").read_text()))
    for row in rows:
        assert row["samples"] == SAMPLES
        for key, value in rows[0].items():
            if isinstance(value, dict):
                for name, values in value.items():
                    np.testing.assert_allclose(row[key][name], values, rtol=1e-12, err_msg=f"{key} {name}")
            elif "top" in key:
                assert row[key] == value, key
            else:
                assert row[key] == pytest.approx(value, rel=1e-12), key
    assert 0 < rows[0]["top1_t1"] < 100
