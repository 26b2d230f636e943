"""The campaign over objectives: its rows, its tables, and that nothing is run twice."""

import csv
import re
from pathlib import Path

import numpy as np
import objectives
import pytest
from scipy import stats

CURVES = {
    "all": {0: [60.0, 62.0, 63.0], 1: [61.0, 62.5, 63.5], 2: [60.5, 62.1, 63.1]},
    "sce_skl": {0: [57.0, 63.5, 64.0], 1: [57.9, 63.9, 64.6], 2: [57.6, 63.4, 64.4]},
    "alone_t1": {0: [61.0], 1: [61.9], 2: [61.2]},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for variant, by_seed in CURVES.items():
        for seed, curve in by_seed.items():
            row = dict.fromkeys(objectives.COLUMNS, "") | {
                "recipe": "fashion_sew",
                "variant": variant,
                "seed": str(seed),
            }
            objectives.add_row(tmp_path / "o.csv", row | {"top1": " ".join(map(str, curve))})
    (tmp_path / "page.md").write_text("before\n<!-- objectives: fashion_sew -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return ["fashion_sew", str(folder / "work"), f"--csv={folder}/o.csv", f"--page={folder}/page.md", *more]


def test_rows_that_are_there_are_not_run_and_the_tables_are_the_t_tests(results, capsys):
    assert objectives.main(arguments(results, "--variants=all,sce_skl,alone_t1")) == 0
    assert not (results / "work").exists()
    page = (results / "page.md").read_text()
    assert page.startswith("before\n<!-- objectives: fashion_sew -->\n| variant")
    assert page.endswith("<!-- end -->\nafter\n")
    assert "old" not in page
    gaps = np.array([CURVES["sce_skl"][s][0] - CURVES["all"][s][0] for s in range(3)])
    low, high = stats.t.interval(0.95, 2, gaps.mean(), stats.sem(gaps))
    assert f"| `sce_skl` | 3 | {gaps.mean():+.2f} [{low:+.2f}, {high:+.2f}] |" in page
    # Of another number of timesteps: what both have is compared.
    assert re.search(r"\| `alone_t1` \| 3 \| \+\d\.\d\d \[[^|]*\|  \|  \|", page)
    assert "| `all` | 3 | 60.50 ± 0.50 |" in page
    tables = page.partition("-->\n")[2].partition("\n<!--")[0]
    assert tables.startswith("| variant")
    assert tables in capsys.readouterr().out


def test_other_settings_are_other_runs(results, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(objectives, "run", lambda args, variant, seed: asked.append((variant, seed)))
    others = [*arguments(results, "--variants=all", "--seeds=0", "train.epochs=9")]
    before = (results / "page.md").read_text()
    assert objectives.main(others) == 2  # the page's table would lose the rows of these
    assert "o.csv has rows of fashion_sew with no settings, which its tables would lose" in capsys.readouterr().err
    assert (results / "page.md").read_text() == before
    assert objectives.main([text for text in others if not text.startswith("--page")]) == 1
    assert asked == [("all", "0")]


def test_a_mistake_is_told_before_anything_runs(results, capsys):
    assert objectives.main(arguments(results, "--variants=all,mixed,mox")) == 2
    said = capsys.readouterr().err
    assert "variant=mixed: no such file" in said
    assert "variant=mox: no such file" in said
    assert not (results / "work").exists()
    for text in ("no marks\n", "<!-- objectives: fashion_sew -->\nwhat would be lost\n"):
        (results / "page.md").write_text(text)
        assert objectives.main(arguments(results, "--variants=all")) == 2
        assert "no mark <!-- objectives: fashion_sew --> with a mark <!-- end --> after it" in capsys.readouterr().err
        assert (results / "page.md").read_text() == text


@pytest.mark.slow
def test_runs_fill_rows_and_a_finished_one_is_taken_as_it_is(tree, tmp_path, capfd):
    settings = [
        f"data.train={tree}", f"data.val={tree}", "data.format=imagefolder", "data.image_size=16", "loss.alpha=0",
        "student.num_classes=3", "student.width=8", "train.epochs=1", "train.batch_size=6", "wandb.mode=disabled",
    ]  # fmt: skip
    command = [
        "fashion_sew",
        str(tmp_path),
        *settings,
        "--variants=all_v_init,tet",
        "--seeds=0",
        f"--csv={tmp_path}/o.csv",
    ]
    assert objectives.main(command) == 0
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [(row["variant"], row["seed"], len(row["top1"].split())) for row in rows] == [
        ("all_v_init", "0", 4), ("tet", "0", 4)
    ]  # fmt: skip
    steps = (tmp_path / "fashion_sew" / "tet-seed0" / "metrics.jsonl").read_bytes()
    (tmp_path / "o.csv").unlink()
    assert objectives.main(command) == 0
    again = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [row["top1"] for row in again] == [row["top1"] for row in rows]
    assert (tmp_path / "fashion_sew" / "tet-seed0" / "metrics.jsonl").read_bytes() == steps
