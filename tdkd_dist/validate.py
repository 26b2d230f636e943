"""One pass over the validation set: every timestep's accuracy at once.

Shapes: T timesteps, B batch, C channels, H and W pixels, K classes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tdkd_dist.activity import ActivityMeter
from tdkd_dist.anytime import ExitRule
from tdkd_dist.data.normalise import Normalise, as_input
from tdkd_dist.exits import ExitCounts
from tdkd_dist.metrics import EXIT_RULES, TimestepCounts
from tdkd_dist.students.base import SpikingNet


def as_timesteps(logits: Tensor) -> Tensor:
    """`[T, B, K]`: an ordinary network's `[B, K]` counts as one timestep."""
    return logits if logits.ndim == 3 else logits.unsqueeze(0)


def validate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    normalise: Normalise,
    *,
    num_timesteps: int,
    device: torch.device,
    autocast: bool = False,
    activity_images: int = 0,
    exit: ExitRule | None = None,
) -> dict[str, Any]:
    """What a network is worth after t = 1..T timesteps, over all ranks' batches; see `TimestepCounts.summary`.

    A spiking student runs `num_timesteps` steps, whatever it trains with, and is left as it was. Its activity is
    counted in the same pass, on this rank's first `activity_images` images, and added to the result, with operations
    and energy where those can be counted (`ActivityMeter.summary`); so is what stopping by the rule `exit` is worth
    (`ExitCounts.summary`).
    """
    counts = TimestepCounts()
    exits = ExitCounts(exit, num_timesteps, device) if exit is not None else None
    was_training, trained_timesteps = model.training, getattr(model, "num_timesteps", None)
    model.eval()
    if trained_timesteps is not None:
        model.set_num_timesteps(num_timesteps)  # type: ignore[operator]
    meter = ActivityMeter(model, activity_images, device) if isinstance(model, SpikingNet) else None
    with torch.no_grad():
        for images_BCHW, labels_B in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                x = as_input(normalise(images_BCHW), None if trained_timesteps is None else num_timesteps)
                count = meter.forward if meter is not None and meter.wants_more else None
                logits_TBK = as_timesteps(model(x)) if count is None else count(x)
            counts.update(logits_TBK, labels_B)
            if exits is not None:
                exits.update(logits_TBK, labels_B)
    if trained_timesteps is not None:
        model.set_num_timesteps(trained_timesteps)  # type: ignore[operator]
    model.train(was_training)
    row = counts.summary(num_timesteps, device)
    activity = meter.summary() if meter is not None else None
    if exits is not None:
        row |= exits.summary((activity or {}).get("energy_mj"))
    if activity is None:
        return row
    return row | activity | (_energy_of_exits(row, activity) if "energy_mj_relu" in activity else {})


def _energy_of_exits(row: dict[str, Any], activity: dict[str, Any]) -> dict[str, Any]:
    """The early-exit curves with `energy_mj`: the energy up to t, weighted by the share that exits at t."""
    curves = {}
    for rule in EXIT_RULES:
        curve = row[f"exit_{rule}"]
        shares_GT = torch.tensor(curve["histogram"], dtype=torch.float64) / 100
        energy_T = torch.tensor(activity["energy_mj"])
        curves[f"exit_{rule}"] = curve | {"energy_mj": (shares_GT @ energy_T.double()).tolist()}
    return curves
