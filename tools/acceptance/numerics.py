"""Arithmetic: compiled against eager, two ranks against one process, the teacher's variants against fp32.

Shapes: T timesteps, B images, C channels, H and W pixels, K classes.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step import timed
from torch import Tensor, nn

from acceptance.found import Found
from acceptance.scale import Scale, count_breaks, count_graphs
from tdkd_dist import distributed
from tdkd_dist.batch_norm import synchronise
from tdkd_dist.config import DataConfig, TeacherConfig
from tdkd_dist.students import create_student
from tdkd_dist.teachers import Teacher, create_teacher
from tdkd_dist.training.compilation import compile_training

TOLERANCE = 1e-9
"""Of float64, relative to a tensor's largest entry: rounding, and no spike that flips."""


def float64(scale: Scale) -> Found:
    """The largest relative error of a compiled student's logits, gradients and statistics against the eager one's."""
    scale.spare_code_generation()
    found, worst = Found(), 0.0
    net, eager = _twins(scale)
    compile_training(net)
    for seed in (1, 2):
        x_BCHW, _ = scale.batch(scale.small, seed, torch.float64)
        worst = max(worst, largest_error(look(net, x_BCHW), look(eager, x_BCHW)))
    found.figures |= {"largest relative error": worst, "graphs": count_graphs(), "graph breaks": count_breaks()}
    found.at_most("largest relative error", TOLERANCE)
    found.at_most("graphs", 1)
    found.at_most("graph breaks", 0)
    return found


def ranks(scale: Scale) -> Found:
    """Two ranks on one device over gloo, half the batch each, compiled, against one process with all of it."""
    port = distributed.free_port()
    other = mp.get_context("spawn").Process(target=_other_rank, args=(port, scale))
    other.start()
    found = _one_of_two(0, port, scale)
    other.join()
    found.holds("the other rank found the same", other.exitcode == 0)
    return found


def _other_rank(port: int, scale: Scale) -> None:
    found = _one_of_two(1, port, scale)
    assert found.ok, found


def _one_of_two(rank: int, port: int, scale: Scale) -> Found:
    # gloo, also on a GPU: nccl wants one for every rank.
    distributed.start_here(rank, 2, port, torch.device("cpu"))
    if not scale.on_gpu:
        torch.set_num_threads(1)
    scale.spare_code_generation()
    found, worst = Found(), 0.0
    net, whole = _twins(scale)
    compile_training(synchronise(net))
    for seed in (1, 2):
        x_BCHW, _ = scale.batch(scale.small, seed, torch.float64)
        ours, all_of_it = look(net, x_BCHW.chunk(2)[rank]), look(whole, x_BCHW)
        for name, value in ours.items():
            if name.startswith("gradient"):
                dist.all_reduce(value)
                value /= 2
        all_of_it["logits"] = all_of_it["logits"].chunk(2, dim=1)[rank]
        worst = max(worst, largest_error(ours, all_of_it))
    found.figures |= {"largest relative error": worst, "graphs": count_graphs(), "graph breaks": count_breaks()}
    found.at_most("largest relative error", TOLERANCE)
    found.at_most("graphs", 1)
    found.at_most("graph breaks", 0)
    distributed.stop()
    return found


def _twins(scale: Scale) -> tuple[nn.Module, nn.Module]:
    """The same student twice, in float64 on the device."""
    torch.manual_seed(0)
    net = create_student(scale.config(scale.small).student).double().to(scale.device).train()
    return net, copy.deepcopy(net)


def look(net: nn.Module, x_BCHW: Tensor) -> dict[str, Tensor]:
    """Logits `[T, B, K]`, gradients and statistics of a step whose loss is a weighted sum, the mean over samples."""
    net.zero_grad()
    logits_TBK = net(x_BCHW)
    weights_T1K = torch.linspace(-1, 1, logits_TBK[:, 0].numel(), dtype=logits_TBK.dtype, device=logits_TBK.device)
    (logits_TBK * weights_T1K.view(len(logits_TBK), 1, -1)).mean(1).sum().backward()
    found = {"logits": logits_TBK.detach()}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers()}


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two entries, relative to the largest entry of their tensor or 1."""
    assert ours.keys() == theirs.keys()
    errors = [
        (value.double() - theirs[name].double()).abs().max() / theirs[name].double().abs().max().clamp(min=1)
        for name, value in ours.items()
    ]
    return float(torch.stack(errors).max())


def teacher(scale: Scale) -> Found:
    """How far each way to run the teacher is from eager fp32 without TF32, and what it takes.

    Errors are those of the logits: root mean square of the difference over that of the logits. "Folded" is what a run
    has, `compile_folded`, whose policy it is whether batch norms are folded under autocast; "compiled" never folds.
    """
    torch.backends.cudnn.allow_tf32 = False
    found, size = Found(), scale.whole
    plain = _conditioned_teacher(scale)
    images_BCHW, labels_B = scale.batch(size)
    wanted_BK = plain(images_BCHW)
    for title in ("fp32", "fp32 folded", "bf16", "bf16 compiled", "bf16 folded"):
        network = copy.deepcopy(plain)
        if title == "bf16":
            scale.spare_code_generation()  # folding is a part of it, and has been seen
        if "compiled" in title:
            network.model.compile()
        elif "folded" in title:
            network.compile_folded()
        autocast = torch.autocast(scale.device.type, torch.bfloat16, enabled="bf16" in title)

        def step(x_BCHW: Tensor, _: Tensor, network: Teacher = network, autocast: Any = autocast) -> Tensor:
            with autocast:
                logits_BK: Tensor = network(x_BCHW)
            return logits_BK

        logits_BK = step(images_BCHW, labels_B).float()
        step(images_BCHW, labels_B)
        seconds = timed(step, images_BCHW, labels_B, scale.steps, scale.on_gpu)
        found.figures |= {
            f"{title}: error": float((logits_BK - wanted_BK).norm() / wanted_BK.norm()),
            f"{title}: ms": 1000 * seconds,
        }
    error = float(found.figures["bf16 folded: error"])
    found.figures["bf16 error, folded / plain"] = error / float(found.figures["bf16: error"])
    found.at_most("fp32 folded: error", 1e-4)
    found.at_most("bf16 error, folded / plain", 2.0)
    return found


def _conditioned_teacher(scale: Scale) -> Teacher:
    """A random teacher whose batch norms hold the statistics of a batch and weights off 1, as trained ones do."""
    size = scale.whole
    config = TeacherConfig(size.teacher, pretrained=False)
    network = create_teacher(config, DataConfig(), num_classes=size.num_classes, in_chans=3)
    network.to(scale.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.2)
        norm.train()
        norm.momentum = 1.0
    network(scale.batch(size, seed=1)[0])
    for norm in norms:
        norm.eval()
    return network
