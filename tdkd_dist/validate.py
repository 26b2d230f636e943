"""One pass over the validation set: every timestep's accuracy at once.

Shapes: T timesteps, B batch, C channels, H and W pixels, K classes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tdkd_dist.data.normalise import Normalise
from tdkd_dist.metrics import TimestepCounts


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
) -> dict[str, float]:
    """Accuracy, loss and confidence after t = 1..T timesteps over all ranks' batches; see `TimestepCounts.summary`.

    A spiking student runs `num_timesteps` steps, whatever it trains with, and is left as it was.
    """
    counts = TimestepCounts()
    was_training, trained_timesteps = model.training, getattr(model, "num_timesteps", None)
    model.eval()
    if trained_timesteps is not None:
        model.set_num_timesteps(num_timesteps)  # type: ignore[operator]
    with torch.no_grad():
        for images_BCHW, labels_B in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits_TBK = as_timesteps(model(normalise(images_BCHW)))
            counts.update(logits_TBK, labels_B)
    if trained_timesteps is not None:
        model.set_num_timesteps(trained_timesteps)  # type: ignore[operator]
    model.train(was_training)
    return counts.summary(num_timesteps, device)
