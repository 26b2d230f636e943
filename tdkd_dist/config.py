"""The schema every recipe must fit.

Fields are documented where they are declared; each section checks itself, and `Config.check` what concerns two
sections. A user's mistake is a `Mistake` whose message names the key.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tdkd_dist.launcher_config import LauncherConfig
from tdkd_dist.limits import Section, limited
from tdkd_dist.loss_config import LossConfig
from tdkd_dist.mistakes import Mistakes, require
from tdkd_dist.neuron_config import NeuronConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class RunConfig(Section):
    """What the run is called and where it lives."""

    section: ClassVar[str] = "run"
    name: str = ""
    """The recipe's name unless given; the same name again resumes the run."""
    seed: int = limited(0, "[0, 4294967295]")
    """Fixes initialisation, data order and augmentation."""
    dir: str | None = None
    """The run folder itself; None: `runs/NAME`."""
    allow_other_data: bool = False
    """Go on with a run on data that is not what it trained on so far; the record says from which step on."""

    def check_together(self, found: Mistakes) -> None:
        """What a path may be."""
        name, place = self.name, self.dir
        fits = not set(name) & set("/\\") and name[:1] not in (".", "-") and len(name) <= 200
        found.require(fits, f"run.name={name[:200]}: must be one part of a path, such as my_run")
        fits = place is None or (bool(place.strip("\0 ")) and not Path.cwd().is_relative_to(Path(place).resolve()))
        found.require(fits, f"run.dir={place}: must be a folder for this run alone, such as runs/my_run")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir or f"runs/{self.name}")


@dataclass
class DataConfig(Section):
    """Where the images are and how they are cropped."""

    section: ClassVar[str] = "data"
    train: str | None = None
    """A beton (`format=ffcv`); or an ImageFolder tree, or any source that `tools/write_beton.py` reads."""
    val: str | None = None
    """As `data.train`: the pictures of the validation."""
    format: Literal["ffcv", "imagefolder"] = "ffcv"
    """`imagefolder` reads pictures one by one through torch's DataLoader, without ffcv."""
    image_size: int = limited(224, ">= 1", most=4096)
    """Side of the crop that student and teacher see, in pixels."""
    frames: int | None = limited(None, ">= 1", most=1024)
    """Frames of an event recording, one a timestep (a teacher sees their mean); betons alone. None: pictures."""
    frame_choice: Literal["first", "regroup"] = "first"
    """Where a beton holds more frames than `frames`: the first, or sums of groups of them."""
    event_augment: bool = False
    """In training, to all frames of a recording alike: one of a roll by up to 5 pixels, a rotation by up to 30 degrees,
    and a square of 16 set to 0."""
    stage_to: str | None = None
    """Copy betons to this folder on each node's own disk first, such as `$SLURM_TMPDIR` or `/scratch`."""
    workers: int | None = limited(None, ">= 1", most=1024)
    """Loader threads a rank; None: this rank's share of the job's cores."""
    crop: Literal["random_resized", "shift", "none"] = "random_resized"
    """In training: `random_resized` (area 0.08 to 1), `shift` (zero-padded by image_size / 8, as on CIFAR), `none`."""
    flip: bool = True
    """In training: mirror half of the pictures."""
    auto_augment: Literal["cifar10", "imagenet", "svhn"] | None = None
    """torchvision's AutoAugment policy, after crop and flip, filling with grey; needs `format=imagefolder`."""
    color_jitter: float = limited(0.0, "[0, 1]", "0: off")
    """Brightness, contrast and saturation times 1 +- this, in random order, after cutout or erasing; 0: off."""
    cutout: int = limited(0, ">= 0", "0: none", most=4096)
    """Side of the black square put around a random pixel of each training crop; 0: none."""
    erasing: float = limited(0.0, "[0, 1]")
    """Probability of filling a random box of the training crop with the mean (random erasing)."""
    mixup: float = limited(0.0, ">= 0", "0: off", most=100)
    """Parameter of the beta distribution by which whole micro-batches are mixed, with their labels; 0: off."""
    cutmix: float = limited(0.0, ">= 0", "0: off", most=100)
    """The same for boxes cut from one picture into another; with mixup on too, each batch takes one at random."""
    start_size: int | None = limited(None, ">= 1", most=4096)
    """Side of the training crops in epoch 0; it grows by multiples of 32 to `image_size` at `full_size_epoch`."""
    full_size_epoch: int = limited(0, ">= 0", most=1_000_000)
    """The epoch from which on crops have their full size, with `start_size`."""
    crop_pct: float = limited(0.875, "[0.01, 1]")
    """Validation: side of the centre crop over the shorter side (224 / 256)."""
    mean: tuple[float, float, float] = limited(IMAGENET_MEAN, "[-100, 100]")
    """Of the red, green and blue channel in [0, 1], which the student's input is normalised with."""
    std: tuple[float, float, float] = limited(IMAGENET_STD, "[0.001, 100]")
    """The standard deviations likewise."""

    def check_together(self, found: Mistakes) -> None:
        """What concerns several keys of the section."""
        found.require(
            self.auto_augment is None or self.format == "imagefolder",
            f"data.auto_augment={self.auto_augment}: FFCV has none; set data.format=imagefolder",
        )
        found.require(not (self.cutout and self.erasing), "data.cutout and data.erasing: choose one")
        found.require(
            self.start_size is None or self.start_size <= self.image_size,
            f"data.start_size={self.start_size}: must be in 1 to data.image_size={self.image_size}",
        )
        if self.frames is None:
            found.require(not self.event_augment, "data.event_augment: is of frames; set data.frames")
            return
        found.require(self.format == "ffcv", f"data.frames={self.frames}: betons alone; set data.format=ffcv")
        of_pictures = [
            k for k in ("auto_augment", "color_jitter", "cutout", "erasing", "start_size") if getattr(self, k)
        ]
        of_pictures += ["crop"] if self.crop != "none" else []
        for key in of_pictures:
            off = "none" if key == "crop" else "null" if getattr(DataConfig, key, None) is None else "0"
            found.require(
                False, f"data.{key}={getattr(self, key)}: is of pictures; with data.frames set data.{key}={off}"
            )

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the student's input is normalised with; counts of events are not."""
        return (self.mean, self.std) if self.frames is None else ((0.0,) * channels, (1.0,) * channels)


@dataclass
class TeacherConfig(Section):
    """A frozen timm model whose logits the student learns from."""

    section: ClassVar[str] = "teacher"
    name: str | None = None
    """Any timm model, with its weights' tag (`resnet34.tv_in1k`); None: no teacher."""
    checkpoint: str | None = None
    """Weights to load instead of timm's: safetensors, or a file that `torch.save` wrote."""
    pretrained: bool = True
    """Fetch timm's weights when there is no checkpoint; false: random weights, for trying things out."""
    mean: tuple[float, float, float] | None = limited(None, "[-100, 100]")
    """What its input is normalised with; None: as its file says, or timm's configuration of `name`."""
    std: tuple[float, float, float] | None = limited(None, "[0.001, 100]")
    """The standard deviations likewise."""
    image_size: int | None = limited(None, ">= 1", most=4096)
    """Resize the student's crops to this for the teacher; None: it sees them as they are, where its model allows."""
    min_top1: float = limited(0.0, "[0, 100]", "per cent")
    """Stop before training if the teacher's top-1 on the validation set, in per cent, is below this."""

    @property
    def is_random(self) -> bool:
        """Whether its weights are random, for trying things out."""
        return self.checkpoint is None and not self.pretrained

    def check_together(self, found: Mistakes) -> None:
        """Both, or neither."""
        found.require((self.mean is None) == (self.std is None), "teacher.mean and teacher.std: set both, or neither")


@dataclass
class StudentConfig(Section):
    """The network that is trained; what `timm.create_model` is called with."""

    section: ClassVar[str] = "student"
    model: str = "sew_resnet34"
    """A spiking student, or any timm model (trained as an ordinary network, one timestep)."""
    checkpoint: str | None = None
    """Start from these weights: a safetensors file that a run or `tools/import_weights.py` wrote."""
    num_classes: int = limited(1000, ">= 1", most=1_000_000)
    """Classes K; the data may have fewer."""
    num_timesteps: int = limited(4, ">= 1", most=1024)
    """Timesteps T of training; the same weights serve any number."""
    neuron: NeuronConfig = field(default_factory=NeuronConfig)
    connect: Literal["ADD", "AND", "IAND"] | None = None
    """How a SEW block joins its branches; None: the model's default, ADD."""
    width: int | None = limited(None, ">= 1", most=8192)
    """Channels of the first stage; None: the model's default."""
    in_chans: int = limited(3, ">= 1", most=1024)
    """Channels of the images: 3 for colour."""
    drop_path: float = limited(0.0, "[0, 1)")
    """Chance that the last block's residual branch is dropped for a sample; it grows linearly from 0 at the first."""
    zero_init_last: bool | None = None
    """Start the last batch norm of each residual branch at 0; None: the model's default (true for ms_resnet)."""
    first_statistics: bool = False
    """Batch norms behind the stem have statistics of their own for the first timestep, at which fewer neurons fire."""

    def check_together(self, found: Mistakes) -> None:
        """What concerns several keys of the section."""
        found.require(
            not self.first_statistics or self.num_timesteps > 1,
            "student.first_statistics: the other timesteps need theirs; set student.num_timesteps to 2 or more",
        )


@dataclass
class OptimConfig(Section):
    """Optimiser and schedule, both timm's."""

    section: ClassVar[str] = "optim"
    name: str = "momentum"
    """timm's name: `momentum` is SGD with momentum, `sgd` the same with Nesterov, `lamb`, `adamw`, ..."""
    lr: float = limited(0.2, "> 0", most=1000)
    """For the recipe's global batch; scale it in proportion when `train.batch_size` changes."""
    momentum: float = limited(0.9, "[0, 1)")
    """Of `momentum`, `sgd` and what else has one; 0: none."""
    weight_decay: float = limited(2e-5, ">= 0", most=10)
    """On convolution and linear weights only, unless `decay_all`."""
    decay_all: bool = False
    """Weight decay on norms and biases too."""
    clip_grad: float = limited(0.0, ">= 0", "0: no clipping", most=1_000_000)
    """Largest norm of the whole gradient; 0: no clipping."""
    schedule_on: Literal["epoch", "step"] = "epoch"
    """The cosine to 0 moves once an epoch (the paper) or at every optimiser step (short runs)."""
    warmup_epochs: int = limited(0, ">= 0", most=1_000_000)
    """Epochs in which the rate rises linearly from a tenth of `lr`."""


@dataclass
class TrainConfig(Section):
    """Length, batches and arithmetic of the training."""

    section: ClassVar[str] = "train"
    epochs: int = limited(100, ">= 0", most=1_000_000)
    """0: evaluate `student.checkpoint` and stop."""
    max_steps: int | None = limited(None, ">= 1", most=10**12)
    """Stop after so many optimiser steps, whatever `epochs` says."""
    batch_size: int = limited(512, ">= 1", most=10_000_000)
    """The global batch: images an optimiser step, over all ranks."""
    micro_batch: int | None = limited(None, ">= 1", most=10_000_000)
    """Images a forward pass on one rank, at most; None: the rank's whole share. Gradients accumulate over the rest."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16`: autocast, with membrane and batch norm in fp32; on a device without it (a GPU before Ampere, an x86 CPU
    without AVX-512) fp32, many times as fast there. `auto`: bf16 on a GPU, fp32 on a CPU."""
    compile: bool | str = "auto"
    """`auto`: torch.compile on a GPU when the run is long enough to pay for it."""
    activation_budget: float = limited(1.0, "(0, 1]")
    """Share of its activations that a compiled student keeps for the backward pass. At 0.7 the convolutions' outputs
    alone: spikes are computed again from them. Less: some convolutions run twice. Eager, it does nothing."""
    recompute_stages: list[int] = limited([], ">= 1", most=100)  # noqa: RUF009
    """Stages (from 1) whose blocks keep only their inputs for the backward pass: less memory, more time."""
    sync_bn: bool = True
    """Batch statistics over all ranks."""
    random_timesteps: bool = False
    """Run a number of timesteps drawn from 1 to T in each optimiser step, the same on all ranks."""
    ema_decay: float = limited(0.0, "[0, 1)")
    """Exponential moving average of the weights; 0: off."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO stage: 0 suits students of this size."""
    save_every_min: float = limited(30.0, "> 0", most=1_000_000)
    """Minutes between checkpoints within an epoch; each epoch's end and a stop save one too."""
    save_every_steps: int | None = limited(None, ">= 1", most=10**12)
    """Optimiser steps between checkpoints, besides."""
    keep_checkpoints: int = limited(2, ">= 1", most=10_000)
    """The newest so many stay, and the one of the best validation."""
    max_skipped: int = limited(10, ">= 0", most=1_000_000)
    """Steps in a row whose loss may be NaN or infinite; such a step is skipped on all ranks."""
    log_every: int = limited(20, ">= 1", most=10**9)
    """Optimiser steps between training rows of the record."""

    def __post_init__(self) -> None:
        if isinstance(self.compile, str):
            text = self.compile.lower()
            require(text in ("auto", "true", "false"), f"train.compile={self.compile}: must be auto, true or false")
            self.compile = {"true": True, "false": False}.get(text, "auto")
        super().__post_init__()


@dataclass
class EvalConfig(Section):
    """Validation after every timestep."""

    section: ClassVar[str] = "eval"
    num_timesteps: int | None = limited(None, ">= 1", most=1024)
    """Timesteps to evaluate; None: as many as the student trains with."""
    every: int = limited(1, ">= 1", most=1_000_000)
    """Epochs between validations; the last epoch is always validated."""
    batch_size: int | None = limited(None, ">= 1", most=10_000_000)
    """Images a forward pass on one rank; None: as in training."""
    exit: str | None = None
    """A rule that `tools/calibrate_exit.py` wrote: accuracy, mean timesteps and energy when stopping by it, besides."""
    activity_images: int = limited(512, ">= 0", most=10**9)
    """Firing rates and operations are counted on the first images of the set, about so many in all; 0: not at all."""


@dataclass
class WandbConfig(Section):
    """Weights & Biases."""

    section: ClassVar[str] = "wandb"
    project: str = "tdkd-dist"
    """The project that runs are shown in."""
    entity: str | None = None
    """The user or team whose project it is; None: yours."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online if this user is logged in, else offline."""
    timeout_s: float = limited(60.0, "> 0", "seconds", most=100_000)
    """The longest that a run waits for an unreachable server: once at its start, and once at its end."""


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def check(self) -> None:
        """Raise `Mistake`, a line for each thing that no section can see alone."""
        found = Mistakes()
        world, batch, micro = self.launcher.world_size, self.train.batch_size, self.train.micro_batch
        found.require(
            batch % world == 0,
            f"train.batch_size={batch} does not divide over {world} ranks"
            " (launcher.nodes x launcher.tasks_per_node): choose a multiple",
        )
        if batch % world == 0:
            share = batch // world
            found.require(
                micro is None or share % min(micro, share) == 0,
                f"train.micro_batch={micro} does not divide a rank's share of {share} images"
                f" (train.batch_size={batch} over {world} ranks)",
            )
            found.require(
                self.micro_batch % 2 == 0 or not (self.data.mixup or self.data.cutmix),
                f"data.mixup and data.cutmix pair pictures: the micro-batch of {self.micro_batch} must be even",
            )
        found.require(
            not self.needs_teacher or self.teacher.name is not None,
            f"loss.alpha={self.loss.alpha} needs a teacher: set teacher.name, or loss.alpha=0",
        )
        frames, T = self.data.frames, self.student.num_timesteps
        found.require(
            frames is None or T in (1, frames),
            f"student.num_timesteps={T}: data.frames={frames} are one a timestep; make them equal",
        )
        found.require(
            frames is None or self.eval_timesteps <= frames,
            f"eval.num_timesteps={self.eval_timesteps}: there are only data.frames={frames}",
        )
        epochs, warmup = self.train.epochs, self.optim.warmup_epochs
        found.require(
            epochs == 0 or warmup <= epochs,
            f"optim.warmup_epochs={warmup}: train.epochs={epochs} end before; set optim.warmup_epochs=0",
        )
        found.require(
            epochs > 0 or self.student.checkpoint is not None,
            "train.epochs=0 evaluates a file: set student.checkpoint=FILE",
        )
        found.tell()

    @property
    def needs_teacher(self) -> bool:
        """Whether the run trains with a teacher's logits."""
        return self.train.epochs > 0 and self.loss.alpha > 0

    @property
    def micro_batch(self) -> int:
        """Images a forward pass on one rank."""
        share = self.train.batch_size // self.launcher.world_size
        return min(self.train.micro_batch or share, share)

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimiser step, on each rank."""
        return self.train.batch_size // self.launcher.world_size // self.micro_batch

    @property
    def eval_timesteps(self) -> int:
        """Timesteps of a validation pass."""
        return self.eval.num_timesteps or self.student.num_timesteps


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A dataclass as `{"section.key": value}`."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat
