"""At which size the checks run, and how they measure: a recipe's size on a GPU, a small one on a processor.

Shapes: B images of a micro-batch, C channels, H and W pixels.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from step import allocated_mib
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity

from tdkd_dist import distributed
from tdkd_dist.config import Config
from tdkd_dist.recipe import load_config

WITHOUT_CODE = "aot_eager_decomp_partition"
"""Compiles as far as Inductor's input and generates nothing, which takes C++ a minute a graph on two cores."""
SHARE_OF_THE_CARD = 0.8
"""Of a GPU's memory that a step may take: the rest is for fragments, NCCL and the display of others."""


@dataclass(frozen=True)
class Size:
    """A network and its batch."""

    student: str
    teacher: str
    timesteps: int
    micro_batch: int
    image_size: int
    num_classes: int = 1000
    width: int | None = None


@dataclass(frozen=True)
class Scale:
    """How much a check does, and on what device."""

    device: torch.device
    whole: Size
    """Of the run whose step is measured."""
    plain: Size
    """Of what is compared with others' networks, which know no width."""
    small: Size
    """Where arithmetic is compared, in float64, or only graphs are counted."""
    rounds: int
    steps: int
    """Of a round, and of what is profiled."""
    recipes: tuple[str, ...] | None
    """Whose micro-batch must fit; None: every recipe meant for a GPU."""
    validation_batches: int

    @property
    def on_gpu(self) -> bool:
        """Whether times, memory and idle shares mean something."""
        return self.device.type == "cuda"

    def config(self, size: Size, *overrides: str) -> Config:
        """The ImageNet recipe at this size on one rank, two micro-batches a step, with a random teacher."""
        settings = {
            "student.model": size.student,
            "student.width": "null" if size.width is None else size.width,
            "student.num_classes": size.num_classes,
            "student.num_timesteps": size.timesteps,
            "teacher.name": size.teacher,
            "teacher.pretrained": "false",
            "teacher.min_top1": 0,
            "data.image_size": size.image_size,
            "train.batch_size": 2 * size.micro_batch,
            "train.micro_batch": size.micro_batch,
            "launcher.gpus_per_node": int(self.on_gpu),
            "launcher.tasks_per_node": 1,
            "wandb.mode": "disabled",
        }
        return load_config("imagenet_sew34", [*(f"{key}={value}" for key, value in settings.items()), *overrides])

    def options(self, size: Size, variant: str, *, compiled: bool) -> argparse.Namespace:
        """What the contestants of `bench/step.py` are asked for."""
        return argparse.Namespace(
            device=self.device.type,
            student=size.student,
            teacher=size.teacher,
            timesteps=size.timesteps,
            batch=size.micro_batch,
            size=size.image_size,
            precision="bf16" if self.on_gpu else "fp32",
            compile=compiled,
            layout="channels_last",
            set=[],
            variant=variant,
        )

    def batch(self, size: Size, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Random images in channels_last and their labels, the same for every device."""
        generator = torch.Generator().manual_seed(seed)
        side, n = size.image_size, size.micro_batch
        images_BCHW = torch.randn(n, 3, side, side, generator=generator, dtype=dtype)
        labels_B = torch.randint(size.num_classes, (n,), generator=generator)
        return images_BCHW.to(self.device, memory_format=torch.channels_last), labels_B.to(self.device)

    def start_group(self) -> None:
        """Join a process group of this process alone."""
        distributed.start_here(0, 1, distributed.free_port(), self.device)

    def spare_code_generation(self) -> None:
        """On a processor, have what is compiled from now on stop before Inductor."""
        if not self.on_gpu:
            compile_with(WITHOUT_CODE)

    def wait(self) -> None:
        """For the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def profile(self, step: Callable[[], object]) -> list[Any]:
        """The profiler's raw events of a step, and of what it starts on the device."""
        with torch.profiler.profile(activities=activities(self.device)) as found:
            step()
            self.wait()
        return raw_events(found)

    def kernels(self, step: Callable[[], object]) -> int:
        """How many kernels a step starts on a GPU; how many operations it is made of on a processor."""
        events = self.profile(step)
        return len(list(on_device(events))) if self.on_gpu else sum(e.name().startswith("aten::") for e in events)

    def peak_mib(self, step: Callable[[], object]) -> float:
        """The most that is allocated in a step: all that is there on a GPU, what a step adds on a processor."""
        if not self.on_gpu:
            return allocated_mib(step)
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        step()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**20

    @property
    def memory_mib(self) -> float:
        """What a step may take."""
        if not self.on_gpu:
            return float("inf")
        return SHARE_OF_THE_CARD * torch.cuda.get_device_properties(self.device).total_memory / 2**20


def full_scale() -> Scale:
    """The recipe imagenet_sew34 on one GPU."""
    whole = Size("sew_resnet34", "resnet34", timesteps=4, micro_batch=64, image_size=224)
    small = Size("sew_resnet18", "resnet18", timesteps=4, micro_batch=8, image_size=64, num_classes=100)
    device = torch.device("cuda", 0)
    return Scale(device, whole, whole, small, rounds=5, steps=20, recipes=None, validation_batches=20)


def reduced_scale() -> Scale:
    """The same in small, on the processor."""
    small = Size("sew_resnet8", "resnet10t", timesteps=2, micro_batch=2, image_size=32, num_classes=10, width=8)
    plain = Size("sew_resnet18", "resnet10t", timesteps=2, micro_batch=2, image_size=32)
    recipes = ("imagenet_sew18", "cifar10_resnet18")
    device = torch.device("cpu")
    return Scale(device, small, plain, small, rounds=2, steps=3, recipes=recipes, validation_batches=2)


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What the profiler is to look at: on a GPU kernels and calls of the runtime alone, which costs the least."""
    return [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]


def raw_events(profile: torch.profiler.profile) -> list[Any]:
    """The events as Kineto has them: their tree would take longer to build than the steps took."""
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    return list(profile.profiler.kineto_results.events())


def on_device(events: Iterable[Any]) -> Iterable[Any]:
    """The kernels, copies and fills of a GPU."""
    return (event for event in events if event.device_type() == DeviceType.CUDA)


def compile_with(backend: Callable[..., Any] | str) -> None:
    """Have `nn.Module.compile` use this backend from now on in this process, whatever it is called with."""
    original = nn.Module.compile

    def compile_(self: nn.Module, *arguments: Any, **keywords: Any) -> None:
        # Inductor's options mean nothing to another backend.
        kept = {key: value for key, value in keywords.items() if key not in ("options", "mode")}
        original(self, *arguments, **kept | {"backend": backend})

    nn.Module.compile = compile_  # type: ignore[method-assign]


def count_graphs() -> int:
    """Graphs that Dynamo has had compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def count_breaks() -> int:
    """How often Dynamo has cut a graph in this process."""
    return sum(counters["graph_break"].values())
