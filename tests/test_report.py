"""Comparison of runs, on run folders whose records come from our own metrics of random logits."""

import html.parser
import json
import math
from pathlib import Path

import compare_runs
import numpy as np
import pytest
import torch
from scipy import stats

from tdkd_dist.anytime import ExitRule
from tdkd_dist.curves import flatten_curves
from tdkd_dist.exits import ExitCounts
from tdkd_dist.files import write_json
from tdkd_dist.metrics import TimestepCounts
from tdkd_dist.mistakes import printable
from tdkd_dist.recipe import load_config
from tdkd_dist.report import page, tables, wandb_report
from tdkd_dist.report.page import write_page
from tdkd_dist.report.runs import check_comparable, group_runs, load_runs, paired_differences
from tdkd_dist.run.folder import RunFolder

EPOCHS = 3


def make_run(
    root: Path,
    name: str,
    *overrides: str,
    seed: int = 0,
    quality: float = 1.0,
    finished: bool = True,
    exit: ExitRule | None = None,
    energy: bool = True,
) -> Path:
    """A run folder as training leaves it, except that its logits are drawn at random."""
    path = root / f"{name}-seed{seed}"
    config = load_config(
        "fashion_sew",
        [*overrides, f"run.name={path.name}", f"run.seed={seed}", f"run.dir={path}", f"train.epochs={EPOCHS}",
         f"data.val={root}/val.beton"],
    )  # fmt: skip
    folder = RunFolder(path)
    folder.create(config)
    T = config.student.num_timesteps
    generator = torch.Generator().manual_seed(seed + 10)
    labels = torch.randint(10, (400,), generator=generator)
    rows = []
    for epoch in range(1, EPOCHS + 1 if finished else 2):
        noise = torch.randn(T, 400, 10, generator=generator)
        counts = TimestepCounts()
        logits = noise + quality * epoch * torch.nn.functional.one_hot(labels, 10)
        counts.update(logits, labels)
        row = counts.summary(T, torch.device("cpu"))
        if exit is not None:
            exits = ExitCounts(exit, T, torch.device("cpu"))
            exits.update(logits, labels)
            row |= exits.summary([float(t) for t in range(1, T + 1)] if energy else None)
        write_json(folder.validation_file, row)
        at = {"epoch": epoch, "global_step": epoch * 10}
        rows.append(at | {f"train/loss_t{t}": 2.0 / epoch for t in range(1, T + 1)} | {"train/step_ms": 50.0})
        rows.append(at | flatten_curves(row, "val/"))
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        write_json(folder.summary_file, {"epochs": EPOCHS, "max_steps": None, "table": "", "figure": ""})
    return path


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path, name, *overrides, seed=seed, quality=quality)
        for name, overrides, quality in (("all", [], 1.0), ("twce", ["loss.alpha=0", "loss.beta=0"], 0.8))
        for seed in (0, 1, 2)
    ]


def test_seeds_are_grouped_by_the_configuration_they_share(folders):
    groups = group_runs(load_runs(folders)[0])
    assert [(group.name, len(group.runs)) for group in groups] == [("all", 3), ("twce", 3)]
    differing = {row[0]: row[1:] for row in tables.differences_table(groups)[1:]}
    assert differing == {"loss.alpha": ["0.2", "0.0"], "loss.beta": ["0.5", "0.0"]}


def test_groups_of_one_name_are_told_apart(tmp_path):
    runs, _ = load_runs([make_run(tmp_path, "a"), make_run(tmp_path / "b", "a", "loss.beta=0")])
    runs[1].folder = tmp_path / "elsewhere"
    assert [group.name for group in group_runs(runs)] == ["a (a-seed0)", "a (elsewhere)"]


def test_a_run_given_twice_is_no_second_seed(folders, capsys):
    assert compare_runs.main([str(folders[0]), str(folders[0])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("are the same run, of seed 0: give one of them")


def test_paired_differences_are_the_paired_t_tests(folders):
    ours, theirs = group_runs(load_runs(folders)[0])
    a, b = ours.curves("top1"), theirs.curves("top1")
    for t, found in enumerate(paired_differences(ours, theirs)):
        test = stats.ttest_rel(a[:, t], b[:, t])
        interval = test.confidence_interval()
        assert found.mean == pytest.approx(np.mean(a[:, t] - b[:, t]), rel=1e-12)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
        assert found.resolved == (abs(test.statistic) >= 2 and test.pvalue < 0.05)
        assert found.seeds == 3


def test_one_seed_resolves_nothing(tmp_path):
    runs, _ = load_runs([make_run(tmp_path, "a"), make_run(tmp_path, "b", "loss.beta=0", quality=3)])
    (ours, theirs) = group_runs(runs)
    assert not any(d.resolved for d in paired_differences(theirs, ours))
    assert all(math.isnan(d.standard_error) for d in paired_differences(theirs, ours))


def test_runs_on_other_data_are_refused(tmp_path, capsys):
    one, other = make_run(tmp_path, "a"), make_run(tmp_path / "other", "b")
    with pytest.raises(ValueError, match=r"they cannot be compared$"):
        check_comparable(load_runs([one, other])[0])
    assert compare_runs.main([str(one), str(other)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_unfinished_runs_are_shown_as_such_and_unvalidated_ones_left_out(tmp_path, capsys):
    going, new = make_run(tmp_path, "going", finished=False), make_run(tmp_path, "new", seed=5)
    RunFolder(new).metrics_file.write_text('{"epoch": 0, "global_step": 1}\n{"epoch": 0, "glob')
    page = tmp_path / "page.html"
    assert compare_runs.main([str(going), str(new), "--html", str(page), "--tsne", "0"]) == 0
    said = capsys.readouterr().out
    assert f"{going}: still going, or ended early: 1 of 3 epochs" in said
    assert f"{new}: left out, it has not been validated yet" in said
    assert "still going" in page.read_text()


def test_the_figure_for_a_paper(tmp_path):
    figure = tmp_path / "figure.pdf"
    assert compare_runs.main([str(make_run(tmp_path, "a")), "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"%PDF")


def test_the_figures_for_a_paper(tmp_path, capsys, monkeypatch):
    points = np.random.default_rng(0).normal(size=(30, 2))
    monkeypatch.setattr(page, "embed", lambda run, images: ({1: points, 4: points}, np.arange(30) % 10))
    runs = [str(make_run(tmp_path, "a")), str(make_run(tmp_path, "b", "loss.beta=0"))]
    assert compare_runs.main([*runs, "--figures", str(tmp_path / "figures")]) == 0
    for name, least in (("loss_trends.png", 10_000), ("tsne.png", 10_000)):
        assert (tmp_path / "figures" / name).stat().st_size > least
    assert f"figures: {tmp_path / 'figures'}" in capsys.readouterr().out
    assert compare_runs.main([*runs, "--tsne", "0", "--figures", str(tmp_path / "alone")]) == 0
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["loss_trends.png"]
    evaluation = make_run(tmp_path, "evaluation")
    rows = RunFolder(evaluation).metrics_file
    rows.write_text("".join(row + "\n" for row in rows.read_text().splitlines() if "train/loss" not in row))
    assert compare_runs.main([str(evaluation), "--tsne", "0", "--figures", str(tmp_path / "empty")]) == 0
    assert list((tmp_path / "empty").iterdir()) == []
    assert compare_runs.main([*runs, "--figures", f"{runs[0]}/config.yaml"]) == 2
    assert "config.yaml: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "{tmp}/none: no run is here (no config.yaml)"),
        ([], "the following arguments are required: RUN"),
        (["{tmp}", "--wandb", "mine"], "--wandb mine: must be ENTITY/PROJECT"),
        (["{tmp}", "--tsne", "-3"], "--tsne -3: must not be negative (0: leave it out)"),
        (["{tmp}", "--figure", "x.jpg"], "--figure x.jpg: its name must end with .png, .pdf or .svg"),
        (["{run}", "--figure", "{tmp}/none/x.png"], "--figure {tmp}/none/x.png: cannot be written"),
        (["{run}", "--tsne", "0", "--html", "{tmp}/none/x.html"], "--html {tmp}/none/x.html: cannot be written"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, arguments, message):
    run = make_run(tmp_path, "a")
    assert compare_runs.main([a.format(tmp=tmp_path, run=run) for a in arguments]) == 2
    assert capsys.readouterr().err.startswith("compare_runs: " + message.format(tmp=tmp_path))


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        self.seen.add(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_the_page_is_whole_and_needs_no_network(folders, tmp_path):
    shorter = make_run(tmp_path, "alone", "student.num_timesteps=2", quality=0.9)
    runs, notes = load_runs([*folders, shorter])
    write_page(tmp_path / "page.html", group_runs(runs), notes, tsne_images=0, say=print)
    text = (tmp_path / "page.html").read_text()
    page = Page()
    page.feed(text)
    assert page.fetched == page.open == []
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert page.headings == [
        "Accuracy after every timestep", "What differs", "Paired differences", "Trained at T, tested at t", "To paste",
        "Early exit, energy and firing rates", "Training loss after every timestep", "Training cost", "Runs",
    ]  # fmt: skip
    assert "alone (trained at T = 2)" in text
    assert "±" in text
    assert r"\toprule" in text


def test_what_a_rule_is_worth_is_shown_where_there_is_one(tmp_path, capsys):
    rule = ExitRule("margin", 0.5)
    folders = [make_run(tmp_path, "a", seed=seed, exit=rule, quality=0.4) for seed in (0, 1)]
    folders += [make_run(tmp_path, "a", seed=2), make_run(tmp_path, "b", "loss.beta=0")]
    page = tmp_path / "page.html"
    assert compare_runs.main([*map(str, folders), "--html", str(page), "--tsne", "0"]) == 0
    head, *rows = tables.exit_table(group_runs(load_runs(folders)[0]))
    assert head == [
        "objective", "seeds", "top-1, %", "mean t", *(f"stop at {t}, %" for t in (1, 2, 3, 4)), "mJ",
        "AUROC, confidence", "AUROC, entropy", "AUROC, margin", "top-1 at T, %",
    ]  # fmt: skip
    ((name, seeds, top1, mean_t, *_, mj, confidence, _, margin, at_T),) = rows
    found = [RunFolder(folder).validation_file for folder in folders[:2]]
    found = [json.loads(path.read_text()) for path in found]
    assert (name, seeds) == ("a", "2")
    assert top1 == tables.plus_minus([f["exit_top1"] for f in found])
    assert mean_t == tables.plus_minus([f["exit_mean_timesteps"] for f in found])
    assert at_T == tables.plus_minus([f["top1"][-1] for f in found])
    assert float(mj) == pytest.approx(np.mean([f["exit_mean_timesteps"] for f in found]), rel=1e-3)
    assert float(confidence) == pytest.approx(np.mean([f["exit_auroc_confidence"] for f in found]), rel=1e-3)
    assert float(margin) == pytest.approx(np.mean([f["exit_auroc"] for f in found]), rel=1e-3)
    assert "Stopping by a rule" in page.read_text()
    assert f"| a | 2 | {top1} | {mean_t} |" in capsys.readouterr().out
    spec = json.dumps(
        wandb_report.build(group_runs(load_runs(folders)[0]), [], "lab", "spikes")._to_model().model_dump()
    )
    assert "val/exit_top1" in spec
    assert "Stopping by a rule" in spec


def test_columns_of_a_rule_are_those_that_some_run_has(tmp_path):
    one = make_run(tmp_path, "a", exit=ExitRule("patience", 1), energy=False)
    short = make_run(tmp_path, "b", "student.num_timesteps=2", exit=ExitRule("confidence", 0.9))
    (head, *rows) = tables.exit_table(group_runs(load_runs([one])[0]))
    assert "mJ" not in head
    head, *rows = tables.exit_table(group_runs(load_runs([one, short])[0]))
    a, b = (dict(zip(head, row, strict=True)) for row in rows)
    assert (a["mJ"], b["stop at 3, %"], b["stop at 4, %"]) == ("", "", "")
    assert a["stop at 4, %"]
    assert b["mJ"]
    plain = group_runs(load_runs([make_run(tmp_path / "plain", "c")])[0])
    assert tables.exit_table(plain) is None
    assert "exit_top1" not in json.dumps(wandb_report.build(plain, [], "lab", "spikes")._to_model().model_dump())


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$\\frac{$", "\x1b[2J\ud800", "a & b"])
def test_a_name_is_only_text_in_the_page_and_on_the_terminal(tmp_path, capsys, name):
    runs, _ = load_runs([make_run(tmp_path, "a"), make_run(tmp_path, "b", "loss.beta=0")])
    for run, end in zip(runs, ("1", "2"), strict=True):
        run.config.run.name = run.config.student.model = name + end
    groups = group_runs(runs)
    write_page(tmp_path / "page.html", groups, [printable(name)], tsne_images=0, say=print)
    text = (tmp_path / "page.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.seen
    assert html.unescape(text).count(printable(name) + "1") > 10, "in headings, tables and pictures"
    compare_runs.say(tables.markdown(tables.accuracy_table(groups)))
    assert printable(name) + "1" in capsys.readouterr().out


def test_the_wandb_report_is_kept_when_the_server_cannot_be_reached(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    page = tmp_path / "page.html"
    arguments = [*map(str, folders), "--html", str(page), "--tsne", "0", "--wandb", "lab/spikes"]
    assert compare_runs.main(arguments) == 0
    assert "the W&B report was not sent (" in capsys.readouterr().out
    assert "the W&amp;B report was not sent (" in page.read_text()
    spec = json.dumps(json.loads((tmp_path / "page.wandb.json").read_text()))
    for expected in ("val/top1_t4", "train/loss_t4", "val/energy_mj_t4", "all-seed0", "Paired differences"):
        assert expected in spec, expected
