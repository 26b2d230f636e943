"""A sweep and its comparison, end to end: two small runs on one CPU rank each."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import submit
from in_process import call
from PIL import Image

from tdkd_dist.run.record import read_rows

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped_and_its_runs_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "tree" / f"class{i % 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(60 * (i % 4), 60 * (i % 4) + 70, (24, 24, 3), dtype=np.uint8)).save(path)
    sweep = (
        f"recipe=fashion_sew data.format=imagefolder data.train={tmp_path}/tree"
        f" data.val={tmp_path}/tree data.image_size=24 data.color_jitter=0.4 loss.alpha=0 student.num_classes=4"
        " student.width=8 train.batch_size=20 train.epochs=1 train.random_timesteps=true launcher.tasks_per_node=1"
        f" wandb.mode=disabled run.name=mine run.dir={tmp_path}/runs sweep.loss.beta=[0,0.5]"
    ).split()
    wrong = call(submit.main, *sweep, "sweep.loss.tet=[0,2]")
    assert (wrong.returncode, wrong.stderr.strip()) == (2, "error: loss.tet=2.0: must be in [0, 1)")
    assert not (tmp_path / "runs").exists()

    first = call(submit.main, *sweep)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[2/2] mine-beta0.5" in first.stdout
    assert first.stdout.endswith("the sweep:\n  mine-beta0: finished\n  mine-beta0.5: finished\n")
    members = [tmp_path / "runs" / f"mine-beta{beta}" for beta in ("0", "0.5")]
    rows = [read_rows(member / "metrics.jsonl") for member in members]
    assert "train/sd" in rows[1][0]
    assert rows[1][-1]["val/energy_mj_t4"] > rows[1][-1]["val/energy_mj_t1"] > 0

    again = call(submit.main, *sweep)
    assert again.returncode == 0
    assert again.stdout.count("is finished") == 2

    page = tmp_path / "page.html"
    compared = run("tools/compare_runs.py", *map(str, members), "--html", str(page), "--tsne", "40")
    assert compared.returncode == 0, compared.stderr
    assert "| mine-beta0.5 | 1 |" in compared.stdout
    text = page.read_text()
    assert "mine-beta0, t = 1" in text, "no t-SNE"
    assert "mine-beta0.5, t = 4" in text
