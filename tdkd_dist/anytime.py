"""Any-time inference: a student's answer after each timestep, and stopping when it is sure enough.

A rule looks at m_t, the mean of the logits over the timesteps run so far, alone; so stopping needs no step that has not
been run. Samples that have stopped leave the batch, their membranes with them: a step costs what its survivors cost.

Shapes: T timesteps, B images, K classes.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch._dynamo.config
from torch import Tensor

from tdkd_dist.data.crops import CropRule
from tdkd_dist.data.folder_reader import follow
from tdkd_dist.data.frames import FrameRule
from tdkd_dist.data.normalise import Normalise, as_input
from tdkd_dist.data.sources.source import decode_image, one_line
from tdkd_dist.files import write_json
from tdkd_dist.losses import ensembles
from tdkd_dist.mistakes import Mistake, require
from tdkd_dist.students.base import SpikingNet, State
from tdkd_dist.weights import load_student

VERSIONS = 64
"""Batch sizes, twice, that a student's steps are compiled for; Dynamo's own limit is 8, beyond which it runs eager."""
CROP_PCT = 0.875
"""What validation takes unless a recipe says otherwise, for files that don't say."""
Kind = Literal["confidence", "entropy", "margin", "patience"]


@dataclass(frozen=True)
class ExitRule:
    """When to stop, by the mean of the logits so far, m_t. Raises `Mistake` for a threshold that is none.

    - `confidence`: the largest probability of m_t is at least the threshold (in 0 to 1)
    - `entropy`: its entropy divided by ln K is at most the threshold
    - `margin`: the two largest probabilities differ by at least the threshold
    - `patience`: the predicted class has not changed for so many steps (Zhou et al., NeurIPS 2020)

    `threshold` is one number, or one for each timestep; the last of them is not asked: at T everything stops.
    """

    kind: Kind = "confidence"
    threshold: float | tuple[float, ...] = 0.9
    num_timesteps: int | None = None
    """T, at which all stop; None: the student's own."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """What `calibration.calibrate` found, and on which data."""

    def __post_init__(self) -> None:
        require(self.kind in get_args(Kind), f"kind={self.kind}: must be one of {', '.join(get_args(Kind))}")
        thresholds = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        most = math.inf if self.kind == "patience" else 1.0
        good = bool(thresholds) and all(isinstance(x, int | float) and 0 <= x <= most for x in thresholds)
        require(good, f"threshold={self.threshold}: must be at least 0{'' if most == math.inf else ' and at most 1'}")
        T = self.num_timesteps
        require(T is None or (type(T) is int and T >= 1), f"num_timesteps={T}: must be at least 1")

    def threshold_at(self, t: int) -> float:
        """The threshold after timestep t (from 1); a list that is too short goes on with its last one."""
        if not isinstance(self.threshold, tuple):
            return self.threshold
        return self.threshold[min(t, len(self.threshold)) - 1]

    def score(self, mean: Tensor) -> Tensor:
        """What is compared with the threshold, `[..., B]` of m_t `[..., B, K]`; larger is surer, except for entropy."""
        log_p = torch.log_softmax(mean, dim=-1)
        if self.kind == "entropy":
            return -(log_p.exp() * log_p).nansum(-1) / math.log(max(mean.shape[-1], 2))
        largest = log_p.exp().topk(min(2, mean.shape[-1]), dim=-1).values
        return largest[..., 0] - largest[..., -1] if self.kind == "margin" else largest[..., 0]

    def measure(self, means_TBK: Tensor) -> Tensor:
        """What is compared with the threshold after each timestep, `[T, B]` of m_1, m_2, ...: see `decide_measured`."""
        if self.kind != "patience":
            return self.score(means_TBK)
        unchanged = [torch.zeros_like(means_TBK[0, :, 0], dtype=torch.int64)]
        predicted_TB = means_TBK.argmax(-1)
        for before_B, now_B in itertools.pairwise(predicted_TB):
            unchanged.append((unchanged[-1] + 1) * (now_B == before_B))
        return torch.stack(unchanged)

    def stops(self, measured_B: Tensor, t: int) -> Tensor:
        """`[B]`: who stops after timestep t, by what was measured."""
        threshold = self.threshold_at(t)
        return measured_B <= threshold if self.kind == "entropy" else measured_B >= threshold

    def decide_measured(self, measured_TB: Tensor) -> Tensor:
        """`[B]`: the timesteps (from 1) at which samples stop."""
        stops_TB = torch.stack([self.stops(measured_B, t) for t, measured_B in enumerate(measured_TB, start=1)])
        stops_TB[-1] = True
        return stops_TB.to(torch.uint8).argmax(0) + 1

    def decide(self, logits_TBK: Tensor) -> Tensor:
        """The same, of the logits of all T."""
        return self.decide_measured(self.measure(ensembles(logits_TBK)))

    def save(self, path: str | Path) -> None:
        """Write the rule as JSON."""
        write_json(Path(path), dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "ExitRule":
        """The rule that `save` wrote. Raises `Mistake`, naming the file, if it holds none."""
        try:
            content = json.loads(Path(path).read_text())
            threshold = content["threshold"]
            content["threshold"] = tuple(threshold) if isinstance(threshold, list) else threshold
            return cls(**content)
        except OSError as error:
            raise Mistake(f"{path}: {error.strerror}; tools/calibrate_exit.py writes such a file") from error
        except Mistake as mistake:
            raise Mistake(f"{path}: {mistake}") from mistake
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Mistake(f"{path}: holds no exit rule; tools/calibrate_exit.py writes one") from error


class Decision(NamedTuple):
    """What was decided for each image."""

    classes: Tensor
    """[B], the predicted class."""
    timesteps: Tensor
    """[B], how many were run, from 1."""
    confidence: Tensor
    """[B], the probability of the predicted class."""
    logits: Tensor
    """[B, K], their mean over the timesteps that were run."""


class _Stops:
    """A rule along the timesteps of a batch; it remembers what patience needs, and forgets who has left."""

    def __init__(self, rule: ExitRule) -> None:
        self._rule = rule
        self._predicted_B: Tensor | None = None
        self._unchanged_B: Tensor | None = None

    def __call__(self, mean_BK: Tensor, t: int) -> Tensor:
        """`[B]`: who stops after timestep t."""
        rule = self._rule
        if rule.kind != "patience":
            return rule.stops(rule.score(mean_BK), t)
        predicted_B = mean_BK.argmax(-1)
        if self._predicted_B is None or self._unchanged_B is None:
            self._unchanged_B = torch.zeros_like(predicted_B)
        else:
            self._unchanged_B = (self._unchanged_B + 1) * (predicted_B == self._predicted_B)
        self._predicted_B = predicted_B
        return rule.stops(self._unchanged_B, t)

    def keep(self, rows: Tensor) -> None:
        """Only these samples go on."""
        if self._predicted_B is not None and self._unchanged_B is not None:
            self._predicted_B, self._unchanged_B = self._predicted_B[rows], self._unchanged_B[rows]


class Stepper:
    """A student, one timestep of a batch at a time, and the mean of its logits; survivors can be chosen."""

    def __init__(self, model: SpikingNet, *, step: Callable[..., Any] | None = None, buckets: bool = False) -> None:
        self._step = step or model.step
        self._buckets = buckets

    def start(self, x: Tensor) -> None:
        """Take up normalised images `[B, C, H, W]`, or frames `[B, T, C, H, W]`, one a timestep."""
        self._x, self._state, self._sum, self.t, self._count = x, None, None, 0, len(x)
        if self._buckets:
            self._x = x[self._padded(torch.arange(len(x), device=x.device))]

    _state: State | None
    _sum: Tensor | None

    def step(self) -> Tensor:
        """Run the next timestep: m_t `[B, K]` of those who are left, in fp32 or wider."""
        if self._x.ndim == 5:
            logits, self._state = self._step(self._x[:, self.t], self._state, frame=True)
        else:
            logits, self._state = self._step(self._x, self._state)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        self._sum = logits if self._sum is None else self._sum + logits
        self.t += 1
        return self._sum[: self._count] / self.t

    def keep(self, rows: Tensor) -> None:
        """Only these samples go on."""
        assert self._state is not None
        assert self._sum is not None
        self._count = len(rows)
        rows = self._padded(rows) if self._buckets else rows
        # Of images, the state knows all: a step that is given one doesn't look at them.
        self._x = self._x[rows] if self._x.ndim == 5 else self._x
        self._state = {name: select(value, rows) for name, value in self._state.items()}
        self._sum = self._sum[rows]

    def _padded(self, rows: Tensor) -> Tensor:
        """`rows`, the first again and again up to the next power of two: a compiled step knows few batch sizes."""
        short = (1 << (len(rows) - 1).bit_length()) - len(rows)
        return torch.cat([rows, rows[:1].expand(short)])


def select(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, laid out as x is: whole images are copied, which takes channels_last a third of the time."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


@torch.no_grad()
def decide(stepper: Stepper, x: Tensor, rule: ExitRule | None, num_timesteps: int) -> Decision:
    """Run what `Stepper.start` takes, B at least 1, until the rule (if any) stops each, or `num_timesteps`."""
    B, T = len(x), num_timesteps
    stepper.start(x)
    stops = _Stops(rule) if rule is not None else None
    alive = torch.arange(B, device=x.device)
    stopped, logits = [], []
    timesteps_B = torch.zeros(B, dtype=torch.int64, device=x.device)
    for t in range(1, T + 1):
        mean_BK = stepper.step()
        stops_B = stops(mean_BK, t) if stops is not None and t < T else torch.full_like(alive, t == T, dtype=torch.bool)
        who = stops_B.nonzero().squeeze(1)
        if len(who):
            stopped.append(alive[who])
            logits.append(mean_BK[who])
            timesteps_B[alive[who]] = t
            rows = (~stops_B).nonzero().squeeze(1)
            alive = alive[rows]
            if len(alive) == 0:
                break
            stepper.keep(rows)
            if stops is not None:
                stops.keep(rows)
    order = torch.cat(stopped).argsort()
    logits_BK = torch.cat(logits)[order]
    classes_B = logits_BK.argmax(-1)
    confidence_B = logits_BK.softmax(-1).gather(1, classes_B.unsqueeze(1)).squeeze(1)
    return Decision(classes_B, timesteps_B, confidence_B, logits_BK)


@torch.no_grad()
def stream(stepper: Stepper, x: Tensor, num_timesteps: int) -> Iterator[Tensor]:
    """m_t `[B, K]` after t = 1, 2, ... `num_timesteps`; stop asking when you like."""
    stepper.start(x)
    for _ in range(num_timesteps):
        yield stepper.step()


class AnytimeStudent:
    """A student as it is used: pictures in, decisions out, as soon as it is sure enough.

    Args:
        model: a spiking student whose `default_cfg` has `input_size`, `mean` and `std`, as `load_student` gives it.
        exit: when to stop; None: all timesteps are run.
        num_timesteps: T; None: the rule's, or else the student's own.
        device: where it runs.
        compiled: whether steps are compiled; batches are then filled up to powers of two.
        bf16: whether layers compute in bf16; membranes stay in fp32.
    """

    def __init__(
        self,
        model: SpikingNet,
        exit: ExitRule | None = None,
        *,
        num_timesteps: int | None = None,
        device: torch.device | str = "cpu",
        compiled: bool = False,
        bf16: bool = False,
    ) -> None:
        require(isinstance(model, SpikingNet), f"{type(model).__name__}: no spiking student, it has no timesteps")
        try:
            self.device = torch.device(device)
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:  # torch built without it says so by assertion
            raise Mistake(f"device={device}: cannot be used here: {one_line(error)}") from error
        self.exit = exit
        self.num_timesteps = num_timesteps or (exit and exit.num_timesteps) or model.num_timesteps
        shown = model.default_cfg
        self.image_size: int = shown["input_size"][-1]
        self.crop_pct: float = shown.get("crop_pct") or CROP_PCT
        self.class_names: list[str] | None = shown.get("label_names")
        self.frames: FrameRule | None = frame_rule(shown, self.num_timesteps, self.image_size)
        self._normalise = Normalise(shown["mean"], shown["std"]).to(self.device)
        self._bf16 = bf16
        if compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
        self._step = torch.compile(model.step, dynamic=False) if compiled else None

    @classmethod
    def load(cls, path: str | Path, exit: str | Path | None = None, **options: Any) -> "AnytimeStudent":
        """The student of a file, with the rule of a file. Raises `Mistake`, naming the file, for what is neither."""
        rule = None if exit is None else ExitRule.load(exit)
        model = load_student(path, allow_import=options.pop("allow_import", False))
        require(isinstance(model, SpikingNet), f"{path}: holds no spiking student, which alone has timesteps")
        assert isinstance(model, SpikingNet)
        return cls(model, rule, **options)

    def __call__(self, images: Any) -> Decision:
        """Decide for uint8 images `[B, C, H, W]` of the student's size, a picture or a path, or a list of these.

        A student of event recordings takes counts `[B, frames, C, H, W]`, integers of any size and as many frames as it
        was trained on or more, and looks at one a timestep; or what loaders give. Pictures are cropped as in
        validation. Raises `Mistake`, naming it, for a picture that cannot be read.
        """
        with self._precision():
            return decide(self._stepper(), self.prepare(images), self.exit, self.num_timesteps)

    @torch.no_grad()
    def all_logits(self, images: Any) -> Tensor:
        """Each timestep's own logits `[T, B, K]`, in fp32: what rules are calibrated on."""
        trained = self.model.num_timesteps
        self.model.set_num_timesteps(self.num_timesteps)
        try:
            with self._precision():
                logits_TBK: Tensor = self.model(as_input(self.prepare(images), self.num_timesteps))
        finally:
            self.model.set_num_timesteps(trained)
        return logits_TBK.float()

    def stream(self, images: Any) -> Iterator[Tensor]:
        """The ensemble's logits `[B, K]` after t = 1, 2, ..., to stop when one likes; `images` as for a call."""
        means = stream(self._stepper(), self.prepare(images), self.num_timesteps)
        while True:
            with self._precision():
                mean_BK = next(means, None)
            if mean_BK is None:
                return
            yield mean_BK

    def _stepper(self) -> Stepper:
        """One for each call: a stream that is still being asked has its own state."""
        return Stepper(self.model, step=self._step, buckets=self._step is not None)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)

    def prepare(self, images: Any) -> Tensor:
        """Normalised `[B, C, H, W]` on its device, of whatever a call takes."""
        if self.frames is not None:
            return self._prepare_frames(images, self.frames)
        if not isinstance(images, Tensor):
            pictures = images if isinstance(images, list | tuple) else [images]
            require(len(pictures) > 0, "no pictures were given")
            images = torch.stack([read_picture(p, self.image_size, self.crop_pct) for p in pictures])
        channels, size = self.model.in_chans, self.image_size
        wanted = f"uint8 [B, {channels}, {size}, {size}]"
        fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1:] == (channels, size, size)
        require(fits and len(images) > 0, f"images of {images.dtype} {list(images.shape)}: must be {wanted}")
        x: Tensor = self._normalise(images.to(self.device).contiguous(memory_format=torch.channels_last))
        return x

    def _prepare_frames(self, counts: Any, rule: FrameRule) -> Tensor:
        wanted = f"counts [B, {rule.frames} or more frames, {self.model.in_chans}, height, width]"
        require(isinstance(counts, Tensor), f"{type(counts).__name__}: this student reads recordings; give {wanted}")
        fits = counts.ndim == 5 and len(counts) > 0 and counts.shape[2] == self.model.in_chans
        fits = fits and counts.shape[1] >= rule.frames
        require(fits, f"frames of {counts.dtype} {list(counts.shape)}: must be {wanted}")
        return rule(counts.to(self.device), 0, np.arange(len(counts)))


def frame_rule(shown: dict[str, Any], num_timesteps: int, size: int) -> FrameRule | None:
    """How a student's file says that recordings become what it reads; None: it reads pictures."""
    frames: int | None = shown.get("frames")
    if frames is None:
        return None
    require(
        num_timesteps <= frames, f"num_timesteps={num_timesteps}: it was trained on {frames} frames, one a timestep"
    )
    return FrameRule(frames, shown.get("frame_choice", "first"), size)


def read_picture(picture: Any, size: int, crop_pct: float) -> Tensor:
    """A PIL picture, or the one at a path, as validation crops it: uint8 `[3, size, size]`; `Mistake` if unreadable."""
    if isinstance(picture, str | Path):
        require(Path(picture).is_file(), f"{picture}: no such file")
        pixels_HWC = decode_image(Path(picture), str(picture))
    else:
        require(hasattr(picture, "convert"), f"{type(picture).__name__}: neither a picture nor the path of one")
        pixels_HWC = np.asarray(picture.convert("RGB"))
    height, width = pixels_HWC.shape[:2]
    plan_1P = CropRule(size, "center", crop_pct=crop_pct).plan(0, np.array([0]), np.array([height]), np.array([width]))
    return torch.from_numpy(follow(plan_1P[0], pixels_HWC, size)).permute(2, 0, 1)
