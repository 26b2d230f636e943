"""The loop: what the real trainer waits for, how often shapes compile, and whether a restored run goes on as before.

Shapes: T timesteps, B images of a micro-batch, C channels, H and W pixels.
"""

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from acceptance.found import Found
from acceptance.scale import Scale, Size, activities, compile_with, on_device, raw_events
from tdkd_dist.data.batch import Batch
from tdkd_dist.data.crops import Ints
from tdkd_dist.data.loaders import TrainLoader, ValLoader
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import Heartbeat
from tdkd_dist.run.progress import Progress
from tdkd_dist.run.record import read_rows
from tdkd_dist.students import SpikingNet, create_student
from tdkd_dist.training import checkpoint, trainer
from tdkd_dist.training.compilation import compile_training
from tdkd_dist.training.rank import Place
from tdkd_dist.training.step import TrainStep

WARM_UP = 6
"""Steps before anything is measured: compilation, cudnn's choice of algorithms, the allocator's blocks."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize")
"""Calls by which the processor waits for all that the GPU has to do."""
READS = ("aten::_local_scalar_dense", "aten::nonzero")
"""Operations that would wait for a GPU."""
IDLE = 0.03
"""The largest share of the time that a GPU may have nothing to do."""


class ResidentReader:
    """A loader's reader whose batches lie on the device already, so that nobody waits for pictures."""

    def __init__(self, scale: Scale, size: Size) -> None:
        images_BCHW, self._labels_B = scale.batch(size)
        self._images_BCHW = images_BCHW.mul(50).add(128).clamp(0, 255).to(torch.uint8)

    def batches(self, order: Ints, epoch: int) -> Generator[Batch]:
        """The same micro-batch again and again."""
        for _ in range(0, len(order), len(self._labels_B)):
            yield Batch(self._images_BCHW, self._labels_B)

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class Watch:
    """Asked by the trainer before every optimiser step whether to stop; measures between the questions."""

    device: torch.device
    steps: int
    ms: float = 0.0
    """A step's time, nobody looking."""
    events: list[Any] = field(default_factory=list)
    """The profiler's, of `steps` steps."""
    places: Counter[str] = field(default_factory=Counter)
    """Where the processor waited for the GPU within two steps more."""
    _asked: int = 0
    _started: float = 0.0
    _stack: ExitStack = field(default_factory=ExitStack)
    _profile: torch.profiler.profile | None = None
    _warned: list[warnings.WarningMessage] = field(default_factory=list)

    def __call__(self) -> bool:
        """True once all is measured."""
        self._asked += 1
        timing = WARM_UP + self.steps
        if self._asked == WARM_UP:
            self._wait()
            self._started = time.perf_counter()
        elif self._asked == timing:
            self._wait()
            self.ms = 1000 * (time.perf_counter() - self._started) / self.steps
            self._profile = torch.profiler.profile(activities=activities(self.device))
            self._profile.start()
        elif self._asked == timing + self.steps:
            self._wait()
            assert self._profile is not None
            self._profile.stop()
            self.events = raw_events(self._profile)
            if self.device.type == "cuda":
                self._warned = self._stack.enter_context(warnings.catch_warnings(record=True)) or []
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
        elif self._asked == timing + self.steps + 2:
            if self.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            self._stack.close()
            self.places.update(f"{Path(w.filename).name}:{w.lineno}" for w in self._warned)
            return True
        return False

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def loop(scale: Scale) -> Found:
    """Steps of the real trainer, of which only the loader is replaced: waiting a step, and the GPU's idle share."""
    scale.spare_code_generation()
    found, watch = Found(), Watch(scale.device, scale.steps)
    scale.start_group()
    with tempfile.TemporaryDirectory() as folder:
        rows = _train(scale, Path(folder) / "run", watch)
    names = Counter(event.name() for event in watch.events)
    found.figures |= {"steps": scale.steps, "ms a step": watch.ms, "rows of the record": len(rows)}
    if not scale.on_gpu:
        found.figures["values read a step"] = sum(names[name] for name in READS) / scale.steps
        found.at_most("values read a step", 2)  # whether each micro-batch's loss is finite
        return found
    found.figures |= {
        "waits a step": sum(names[name] for name in WAITS) / scale.steps,
        "events waited for a step": names["cudaEventSynchronize"] / scale.steps,
        "kernels a step": len(list(on_device(watch.events))) / scale.steps,
        "idle share": idle_share([(e.start_ns(), e.start_ns() + e.duration_ns()) for e in on_device(watch.events)]),
        "waited in": ", ".join(f"{place} {n / 2:g}" for place, n in watch.places.most_common(4)) or "nothing",
    }
    found.at_most("waits a step", 1)  # the record's row, every 20 steps, and room for a library's own
    found.at_most("idle share", IDLE)
    return found


def _train(scale: Scale, path: Path, should_stop: Callable[[], bool]) -> list[dict[str, float]]:
    """The record of a run that `should_stop` ends."""
    settings = ("train.compile=true", "train.log_every=20", "optim.lr=0.01", f"run.dir={path}")
    config = scale.config(scale.whole, *settings)
    reader = ResidentReader(scale, scale.whole)
    batch, classes = config.train.batch_size, config.student.num_classes
    loaders = {
        "make_train_loader": TrainLoader(reader, 1000 * batch, classes, batch_size=batch, rank=0, world_size=1, seed=0),
        "make_val_loader": ValLoader(reader, config.micro_batch, classes, rank=0, world_size=1),
    }
    folder = RunFolder(path)
    folder.create(config)
    place = Place(device=scale.device, rank=0, world_size=1, workers=1)
    with ExitStack() as stack:
        for name, loader in loaders.items():
            stack.enter_context(patch.object(trainer, name, lambda *_, loader=loader, **__: loader))
        heartbeat = stack.enter_context(Heartbeat(folder.heartbeat, rank=0, timeout_s=600))
        finished = trainer.run(config, folder, place, heartbeat, should_stop)
    assert not finished
    return [row for row in read_rows(folder.metrics_file) if "train/loss" in row]


def idle_share(busy: list[tuple[int, int]]) -> float:
    """The share of the time from the first start to the last end that lies in none of the intervals; 1 without any."""
    if not busy:
        return 1.0
    busy.sort()
    first, covered, reached = busy[0][0], 0, busy[0][0]
    for start, end in busy:
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - covered / max(1, reached - first)


class CountingBackend:
    """A compiler that compiles nothing, but counts graphs and how often they are called: shapes are Dynamo's affair."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor], **_: Any) -> Callable[..., Any]:
        """Dynamo's backend."""
        self.graphs += 1

        def call(*arguments: Any) -> Any:
            self.calls += 1
            return graph.forward(*arguments)

        return call


def shapes(scale: Scale) -> Found:
    """Compilations of growing images and random T, and whether a shape falls back to eager."""
    found, backend = Found(), CountingBackend()
    compile_with(backend)
    net = create_student(scale.config(scale.small).student).to(scale.device).train()
    assert isinstance(net, SpikingNet)
    compile_training(net)
    side, T, many = scale.small.image_size, scale.small.timesteps, 3 if scale.on_gpu else 2
    pairs = [(side + 32 * k, t) for k in range(many) for t in range(T, 0, -1)]
    graphs, eager = [], 0
    for _ in range(2):
        for pixels, t in pairs:
            before = backend.calls
            net.set_num_timesteps(t)
            x_BCHW = torch.randn(scale.small.micro_batch, 3, pixels, pixels, device=scale.device)
            net(x_BCHW.to(memory_format=torch.channels_last)).sum().backward()
            eager += backend.calls == before
        graphs.append(backend.graphs)
    found.figures |= {
        "pairs of size and T": len(pairs),
        "compilations": graphs[0],
        "compilations, seen again": graphs[1] - graphs[0],
        "passes in eager": eager,
    }
    found.at_most("compilations", len(pairs))
    found.at_most("compilations, seen again", 0)
    found.at_most("passes in eager", 0)
    return found


def restore(scale: Scale) -> Found:
    """Two steps after a checkpoint is restored, against the two of the run that went on, by the largest difference.

    On a GPU the same two steps may differ from themselves by what atomic additions round: that is measured too.
    """
    scale.spare_code_generation()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    found = Found()
    scale.start_group()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = _Run(scale)
        first.steps(0, 2)
        progress = Progress(global_step=2)
        saved = checkpoint.save(folder, first.engine, progress, keep=1, best=False, say=print)
        went_on = first.steps(2, 4)
        again = first.restored(folder).steps(2, 4)
        fresh = _Run(scale).restored(folder)
        resumed = fresh.steps(2, 4)
    found.holds("saved", saved)
    found.holds("the step is the saved one's", fresh.engine.global_step == 4)
    found.figures |= {
        "largest difference": _largest(resumed, went_on),
        "of the same steps again": _largest(again, went_on),
    }
    found.at_most("largest difference", 4 * float(found.figures["of the same steps again"]))
    return found


class _Run:
    """An engine and its steps."""

    def __init__(self, scale: Scale) -> None:
        torch.manual_seed(0)
        self._scale = scale
        config = scale.config(scale.small, "train.ema_decay=0.9", "loss.alpha=0", "optim.lr=0.01")
        student = create_student(config.student).to(scale.device)
        self._step = TrainStep(config, student, None, device=scale.device, steps_per_epoch=2, compiled=True)
        self.engine, self._accumulation = self._step.engine, config.accumulation
        self.engine.student.train()

    def steps(self, start: int, stop: int) -> dict[str, Tensor]:
        """Take these steps; the weights and statistics after them, the moving average's too."""
        for step in range(start, stop):
            seeds = range(10 * step, 10 * step + self._accumulation)
            self._step(self._scale.batch(self._scale.small, seed=seed) for seed in seeds)
        networks: dict[str, nn.Module] = {"student": self.engine.student, "average": self.engine.deployed}
        return {
            f"{k}.{name}": v.detach().clone() for k, net in networks.items() for name, v in net.state_dict().items()
        }

    def restored(self, folder: Path) -> "_Run":
        """The run, in the state of the checkpoint in `folder`."""
        progress = checkpoint.restore(folder, self.engine, print)
        assert progress is not None
        return self


def _largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((value.double() - theirs[name].double()).abs().max()) for name, value in ours.items())
