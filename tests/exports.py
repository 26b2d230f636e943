"""What export is held to: a written file's logits in float64, read back by other programs, beside the student's.

Shapes: T timesteps, B images, K classes.
"""

from pathlib import Path

import torch
from networks import images, student
from torch import Tensor, nn

from tdkd_dist.export import nir, onnx, plain, program
from tdkd_dist.mistakes import Mistake
from tdkd_dist.neuron_config import NeuronConfig

T = 2
RESETS = {"soft": None, "hard": 0.0}
FORMATS = ("ONNX, all timesteps", "ONNX, one timestep", "program", "program, one timestep", "NIR")


def lively(name: str, neuron: NeuronConfig, **kwargs: object) -> nn.Module:
    """A narrow student in float64 for 32 pixels, whose logits differ from image to image."""
    net = student(name, num_timesteps=T, neuron=neuron, **kwargs)
    net.default_cfg = {**net.default_cfg, "input_size": (net.in_chans, 32, 32)}
    for _ in range(8):
        with torch.no_grad():
            if net(images(net.in_chans)).std(1).mean() > 1e-2:
                return net
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.bias += 0.1  # spikes that must meet (AND) die out in a deep network
    raise AssertionError(f"{name}: it gives every image the same logits")


def written(net: nn.Module, form: str, path: Path, *, host_stem: bool = False, frames: int | None = None) -> None:
    """Write the student in a form; `frames`: it reads so many."""
    folded = plain.fold_batch_norms(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    if form == "NIR":
        nir.write(folded, path, host_stem=host_stem)
    else:
        module = onnx if form.startswith("ONNX") else program
        if form.endswith("one timestep"):
            module.write_step(folded, path)
        else:
            module.write(folded, path, frames)


def read(form: str, path: Path, batches: list[Tensor]) -> Tensor:
    """What the file says of the batches, [T, sum of B, K]."""
    if form == "NIR":
        return nir.read_back(path, batches, T)
    module = onnx if form.startswith("ONNX") else program
    if form.endswith("one timestep"):
        return module.read_back_step(path, batches, T)
    return module.read_back(path, batches)


def prove(net: nn.Module, form: str, path: Path) -> tuple[float | None, str]:
    """The worst difference of a logit over batches of 1 and 3, and what it took; None and the line of refusal."""
    x = images(net.in_chans, batch=4)
    with torch.no_grad():
        want, seen, note = net(x), x, ""
        try:
            written(net, form, path)
        except Mistake as mistake:
            assert not path.exists()
            if "--host-stem" not in str(mistake) or "soft reset" in str(mistake):
                return None, str(mistake)
            written(net, form, path, host_stem=True)
            seen, note = net.prepare(x), "--host-stem"
        return float((read(form, path, [seen[:1], seen[1:]]) - want).abs().max()), note
