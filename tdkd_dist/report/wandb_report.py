"""The comparison as a W&B report, through wandb-workspaces."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdkd_dist.curves import key_at
from tdkd_dist.report import tables
from tdkd_dist.report.runs import Group


def build(groups: list[Group], notes: Sequence[str], entity: str, project: str) -> Any:
    """The report in memory: the tables as text, and panels over the project's runs. Nothing is sent."""
    from wandb_workspaces.reports import v2 as wr

    T = max(group.curves("top1").shape[1] for group in groups)
    names = [run.config.run.name for group in groups for run in group.runs]
    chosen = ", ".join(f"'{name}'" for name in names)
    # Without entity and project it is the report's own project's, and nothing has to be looked up on the server.
    runset = wr.Runset(name="compared runs", filters=f"Name in [{chosen}]")

    def over_epochs(title: str, metric: str) -> Any:
        keys = [key_at(metric, t) for t in range(1, T + 1)]
        return wr.LinePlot(title=title, x="epoch", y=keys)

    panels = [
        over_epochs("Top-1 after every timestep", "val/top1"),
        over_epochs("Training loss of the ensembles", "train/loss"),
        over_epochs("Calibration error", "val/ece"),
        over_epochs("Energy, mJ an image", "val/energy_mj"),
        over_epochs("Firing rate", "val/firing_rate"),
        wr.LinePlot(title="ms a step", x="global_step", y=["train/step_ms"]),
        wr.LinePlot(title="Peak memory, MiB", x="global_step", y=["train/peak_memory_mib"]),
        wr.RunComparer(diff_only="split"),
    ]
    exits = tables.exit_table(groups)
    if exits is not None:
        for title, metric in (("Top-1 when stopping by the rule", "top1"), ("Timesteps then", "mean_timesteps")):
            panels.insert(-1, wr.LinePlot(title=title, x="epoch", y=[f"val/exit_{metric}"]))
    blocks: list[Any] = [wr.MarkdownBlock(text=note) for note in notes]
    for title, rows in (
        ("Accuracy after every timestep", tables.accuracy_table(groups)),
        ("Paired differences", tables.paired_table(groups) if len(groups) > 1 else None),
        ("Trained at T, tested at t", tables.matrix_table(groups)),
        ("Early exit, energy and firing rates", tables.full_range_table(groups)),
        ("Stopping by a rule", exits),
        ("Training cost", tables.cost_table(groups)),
    ):
        if rows is not None and len(rows) > 1:
            blocks += [wr.H2(text=title), wr.MarkdownBlock(text=tables.markdown(rows))]
    blocks.append(wr.PanelGrid(runsets=[runset], panels=panels))
    return wr.Report(entity=entity, project=project, title="Comparison of runs", width="fluid", blocks=blocks)


def send_or_keep(report: Any, path: Path) -> str:
    """Save the report on the server, or as JSON at `path` if it can't be reached; what happened, in a line."""
    try:
        report.save()
        return f"W&B report: {report.url}"
    except Exception as error:
        content = report._to_model().model_dump(by_alias=True, mode="json")
        path.write_text(json.dumps(content, indent=1) + "\n")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"the W&B report was not sent ({reason}); it is kept as {path}"
