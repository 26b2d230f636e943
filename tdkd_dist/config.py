"""The schema every recipe must fit.

Fields are documented where they are declared; each section checks itself, and `Config.check` what concerns two
sections. A user's mistake is a `ValueError` whose message names the key.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from tdkd_dist.neurons import NeuronConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)`, a user's mistake, unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass
class RunConfig:
    """What the run is called and where it lives."""

    name: str = ""
    """The recipe's name unless given; the same name again resumes the run."""
    seed: int = 0
    """Fixes initialisation, data order and augmentation."""
    dir: str | None = None
    """The run folder itself; None: `runs/NAME`."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir or f"runs/{self.name}")


@dataclass
class DataConfig:
    """Where the images are and how they are cropped."""

    train: str | None = None
    """A beton (`format=ffcv`); or an ImageFolder tree, or any source that `tools/write_beton.py` reads."""
    val: str | None = None
    format: Literal["ffcv", "imagefolder"] = "ffcv"
    """`imagefolder` reads pictures one by one through torch's DataLoader, without ffcv."""
    image_size: int = 224
    """Side of the crop that student and teacher see, in pixels."""
    stage_to: str | None = None
    """Copy betons to this folder on each node's own disk first, such as `$SLURM_TMPDIR` or `/scratch`."""
    workers: int | None = None
    """Loader threads a rank; None: this rank's share of the job's cores."""
    crop: Literal["random_resized", "shift", "none"] = "random_resized"
    """In training: `random_resized` (area 0.08 to 1), `shift` (zero-padded by image_size / 8, as on CIFAR), `none`."""
    flip: bool = True
    auto_augment: Literal["cifar10", "imagenet", "svhn"] | None = None
    """torchvision's AutoAugment policy, after crop and flip, filling with grey; needs `format=imagefolder`."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation times 1 +- this, in random order, after cutout or erasing; 0: off."""
    cutout: int = 0
    """Side of the black square put around a random pixel of each training crop; 0: none."""
    erasing: float = 0.0
    """Probability of filling a random box of the training crop with the mean (random erasing)."""
    mixup: float = 0.0
    """Parameter of the beta distribution by which whole micro-batches are mixed, with their labels; 0: off."""
    cutmix: float = 0.0
    """The same for boxes cut from one picture into another; with mixup on too, each batch takes one at random."""
    start_size: int | None = None
    """Side of the training crops in epoch 0; it grows by multiples of 32 to `image_size` at `full_size_epoch`."""
    full_size_epoch: int = 0
    crop_pct: float = 0.875
    """Validation: side of the centre crop over the shorter side (224 / 256)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        require(self.image_size >= 1, f"data.image_size={self.image_size}: must be at least 1")
        require(self.workers is None or self.workers >= 1, f"data.workers={self.workers}: must be at least 1")
        require(self.cutout >= 0, f"data.cutout={self.cutout}: must not be negative (0: none)")
        require(0 <= self.erasing <= 1, f"data.erasing={self.erasing}: must be in [0, 1]")
        require(self.mixup >= 0, f"data.mixup={self.mixup}: must not be negative (0: off)")
        require(self.cutmix >= 0, f"data.cutmix={self.cutmix}: must not be negative (0: off)")
        require(0 <= self.color_jitter <= 1, f"data.color_jitter={self.color_jitter}: must be in [0, 1] (0: off)")
        require(
            self.auto_augment is None or self.format == "imagefolder",
            f"data.auto_augment={self.auto_augment}: FFCV has none; set data.format=imagefolder",
        )
        require(not (self.cutout and self.erasing), "data.cutout and data.erasing: choose one")
        require(
            self.start_size is None or 1 <= self.start_size <= self.image_size,
            f"data.start_size={self.start_size}: must be in 1 to data.image_size={self.image_size}",
        )
        require(0 < self.crop_pct <= 1, f"data.crop_pct={self.crop_pct}: must be in (0, 1]")
        require(all(s > 0 for s in self.std), f"data.std={list(self.std)}: must be positive")


@dataclass
class TeacherConfig:
    """A frozen timm model whose logits the student learns from."""

    name: str | None = None
    """Any timm model, with its weights' tag (`resnet34.tv_in1k`); None: no teacher."""
    checkpoint: str | None = None
    """Weights to load instead of timm's: safetensors, or a file that `torch.save` wrote."""
    pretrained: bool = True
    """Fetch timm's weights when there is no checkpoint; false: random weights, for trying things out."""
    min_top1: float = 0.0
    """Stop before training if the teacher's top-1 on the validation set, in per cent, is below this."""


@dataclass
class StudentConfig:
    """The network that is trained; what `timm.create_model` is called with."""

    model: str = "sew_resnet34"
    """A spiking student, or any timm model (trained as an ordinary network, one timestep)."""
    checkpoint: str | None = None
    """Start from these weights: a safetensors file that a run or `tools/import_weights.py` wrote."""
    num_classes: int = 1000
    num_timesteps: int = 4
    neuron: NeuronConfig = field(default_factory=NeuronConfig)
    connect: Literal["ADD", "AND", "IAND"] | None = None
    """How a SEW block joins its branches; None: the model's default, ADD."""
    width: int | None = None
    """Channels of the first stage; None: the model's default."""
    in_chans: int = 3
    drop_path: float = 0.0
    """Chance that the last block's residual branch is dropped for a sample; it grows linearly from 0 at the first."""
    zero_init_last: bool | None = None
    """Start the last batch norm of each residual branch at 0; None: the model's default (true for ms_resnet)."""

    def __post_init__(self) -> None:
        require(0 <= self.drop_path < 1, f"student.drop_path={self.drop_path}: must be in [0, 1)")
        require(self.in_chans >= 1, f"student.in_chans={self.in_chans}: must be at least 1")
        require(self.num_timesteps >= 1, f"student.num_timesteps={self.num_timesteps}: must be at least 1")
        require(self.num_classes >= 1, f"student.num_classes={self.num_classes}: must be at least 1")
        require(self.width is None or self.width >= 1, f"student.width={self.width}: must be at least 1")


@dataclass
class LossConfig:
    """Cross-entropy + alpha * distillation + beta * self-distillation (Yu et al., ICML 2025); see `losses`."""

    target: Literal["temporal", "ensemble", "prefix"] = "temporal"
    """Which logits each term sees: every timestep's own, the final ensemble only, or the ensemble after each step."""
    alpha: float = 0.2
    """Weight of the teacher's term; 0: the teacher is not run."""
    beta: float = 0.5
    """Weight of self-distillation."""
    temperature: float = 1.0
    self_target: Literal["ensemble", "correct_only"] = "ensemble"
    label_smoothing: float = 0.0
    consistency: float = 0.0
    """Weight of each ensemble's cross-entropy to the next one, one timestep later (0.3 is usual); 0: off."""
    tet: float = 0.0
    """Lambda of temporal efficient training: (1 - lambda) cross-entropy + lambda MSE of the logits to 1; 0: off."""

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"loss.alpha={self.alpha}: must not be negative")
        require(self.beta >= 0, f"loss.beta={self.beta}: must not be negative")
        require(self.temperature > 0, f"loss.temperature={self.temperature}: must be positive")
        require(0 <= self.label_smoothing < 1, f"loss.label_smoothing={self.label_smoothing}: must be in [0, 1)")
        require(self.consistency >= 0, f"loss.consistency={self.consistency}: must not be negative")
        require(0 <= self.tet < 1, f"loss.tet={self.tet}: must be in [0, 1)")


@dataclass
class OptimConfig:
    """Optimiser and schedule, both timm's."""

    name: str = "momentum"
    """timm's name: `momentum` is SGD with momentum, `sgd` the same with Nesterov, `lamb`, `adamw`, ..."""
    lr: float = 0.2
    """For the recipe's global batch; scale it in proportion when `train.batch_size` changes."""
    momentum: float = 0.9
    weight_decay: float = 2e-5
    """On convolution and linear weights only, unless `decay_all`."""
    decay_all: bool = False
    """Weight decay on norms and biases too."""
    clip_grad: float = 0.0
    """Largest norm of the whole gradient; 0: no clipping."""
    schedule_on: Literal["epoch", "step"] = "epoch"
    """The cosine to 0 moves once an epoch (the paper) or at every optimiser step (short runs)."""
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr}: must be positive")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: must not be negative")
        require(self.clip_grad >= 0, f"optim.clip_grad={self.clip_grad}: must not be negative (0: no clipping)")
        require(self.warmup_epochs >= 0, f"optim.warmup_epochs={self.warmup_epochs}: must not be negative")


@dataclass
class TrainConfig:
    """Length, batches and arithmetic of the training."""

    epochs: int = 100
    """0: evaluate `student.checkpoint` and stop."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, whatever `epochs` says."""
    batch_size: int = 512
    """The global batch: images an optimiser step, over all ranks."""
    micro_batch: int | None = None
    """Images a forward pass on one rank, at most; None: the rank's whole share. Gradients accumulate over the rest."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16`: autocast, with membrane and batch norm in fp32. `auto`: bf16 on a GPU, fp32 on a CPU."""
    compile: bool | str = "auto"
    """`auto`: torch.compile on a GPU when the run is long enough to pay for it."""
    activation_budget: float = 1.0
    """Share of its activations that a compiled student keeps for the backward pass. At 0.7 the convolutions' outputs
    alone: spikes are computed again from them. Less: some convolutions run twice. Eager, it does nothing."""
    recompute_stages: list[int] = field(default_factory=list)
    """Stages (from 1) whose blocks keep only their inputs for the backward pass: less memory, more time."""
    sync_bn: bool = True
    """Batch statistics over all ranks."""
    random_timesteps: bool = False
    """Run a number of timesteps drawn from 1 to T in each optimiser step, the same on all ranks."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights; 0: off."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO stage: 0 suits students of this size."""
    save_every_min: float = 30.0
    """Minutes between checkpoints within an epoch; each epoch's end and a stop save one too."""
    save_every_steps: int | None = None
    """Optimiser steps between checkpoints, besides."""
    keep_checkpoints: int = 2
    """The newest so many stay, and the one of the best validation."""
    max_skipped: int = 10
    """Steps in a row whose loss may be NaN or infinite; such a step is skipped on all ranks."""
    log_every: int = 20
    """Optimiser steps between training rows of the record."""

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"train.epochs={self.epochs}: must not be negative")
        require(self.max_steps is None or self.max_steps >= 1, f"train.max_steps={self.max_steps}: must be at least 1")
        require(self.batch_size >= 1, f"train.batch_size={self.batch_size}: must be at least 1")
        require(
            self.micro_batch is None or self.micro_batch >= 1,
            f"train.micro_batch={self.micro_batch}: must be at least 1",
        )
        if isinstance(self.compile, str):
            text = self.compile.lower()
            require(text in ("auto", "true", "false"), f"train.compile={self.compile}: must be auto, true or false")
            self.compile = {"true": True, "false": False}.get(text, "auto")
        require(0 < self.activation_budget <= 1, f"train.activation_budget={self.activation_budget}: must be in (0, 1]")
        require(0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay}: must be in [0, 1)")
        require(self.log_every >= 1, f"train.log_every={self.log_every}: must be at least 1")
        require(self.save_every_min > 0, f"train.save_every_min={self.save_every_min}: must be positive")
        require(
            self.save_every_steps is None or self.save_every_steps >= 1,
            f"train.save_every_steps={self.save_every_steps}: must be at least 1",
        )
        require(self.max_skipped >= 0, f"train.max_skipped={self.max_skipped}: must not be negative")
        require(self.keep_checkpoints >= 1, f"train.keep_checkpoints={self.keep_checkpoints}: must be at least 1")


@dataclass
class EvalConfig:
    """Validation after every timestep."""

    num_timesteps: int | None = None
    """Timesteps to evaluate; None: as many as the student trains with."""
    every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    batch_size: int | None = None
    """Images a forward pass on one rank; None: as in training."""
    activity_images: int = 512
    """Firing rates and operations are counted on the first images of the set, about so many in all; 0: not at all."""

    def __post_init__(self) -> None:
        for key in ("num_timesteps", "batch_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"eval.{key}={value}: must be at least 1")
        require(self.activity_images >= 0, f"eval.activity_images={self.activity_images}: must not be negative")
        require(self.every >= 1, f"eval.every={self.every}: must be at least 1")


@dataclass
class LauncherConfig:
    """Where the job runs."""

    cluster: Literal["auto", "local", "slurm"] = "auto"
    """`auto`: Slurm if `sbatch` answers, else this machine."""
    nodes: int = 1
    gpus_per_node: int = 0
    """0: train on the CPU."""
    tasks_per_node: int | None = None
    """Ranks a node; None: one a GPU, or one."""
    cpus_per_task: int | None = None
    """None: an equal share of this machine's cores; on Slurm that of its GPUs in a node's CPUs, 16 at most."""
    time_min: int = 7 * 24 * 60
    """Time limit of one job, in minutes."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem_gb: int | None = None
    """Memory a node, on Slurm; None: the cluster's default."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that the batch script runs before the ranks start, such as `module load cuda`."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """More of sbatch's options, by their long names: `launcher.sbatch.reservation=mine`."""
    srun_args: list[str] = field(default_factory=list)
    """More of srun's arguments."""
    network_interface: str | None = None
    """The interface that NCCL and gloo talk over; None: they choose."""
    signal_delay_s: int = 120
    """How long before the time limit Slurm warns the job, which must be enough to save a checkpoint."""
    hang_timeout_min: float = 20.0
    """A rank that has not moved for so long ends itself, and with it the job; longer than any compilation or save."""
    max_restarts: int = 0
    """How often a job that crashed is started again, from its last checkpoint."""

    def __post_init__(self) -> None:
        require(self.nodes >= 1, f"launcher.nodes={self.nodes}: must be at least 1")
        require(self.gpus_per_node >= 0, f"launcher.gpus_per_node={self.gpus_per_node}: must not be negative")
        require(
            self.tasks_per_node is None or self.tasks_per_node >= 1,
            f"launcher.tasks_per_node={self.tasks_per_node}: must be at least 1",
        )
        require(
            self.gpus_per_node == 0 or self.ranks_per_node == self.gpus_per_node,
            f"launcher.tasks_per_node={self.tasks_per_node}: must equal launcher.gpus_per_node={self.gpus_per_node}"
            " (one rank a GPU), or leave it out",
        )
        require(self.time_min >= 1, f"launcher.time_min={self.time_min}: must be at least 1")
        require(
            0 <= self.signal_delay_s < 60 * self.time_min,
            f"launcher.signal_delay_s={self.signal_delay_s}: must be less than launcher.time_min={self.time_min} min",
        )
        require(self.hang_timeout_min > 0, f"launcher.hang_timeout_min={self.hang_timeout_min}: must be positive")
        require(self.max_restarts >= 0, f"launcher.max_restarts={self.max_restarts}: must not be negative")

    @property
    def ranks_per_node(self) -> int:
        """Processes started on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.ranks_per_node


@dataclass
class WandbConfig:
    """Weights & Biases."""

    project: str = "tdkd-dist"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online if this user is logged in, else offline."""
    timeout_s: float = 60.0
    """The longest that a run waits for an unreachable server: once at its start, and once at its end."""

    def __post_init__(self) -> None:
        require(self.timeout_s > 0, f"wandb.timeout_s={self.timeout_s}: give a positive number of seconds")


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
        """Raise `ValueError` for what no section can see alone."""
        world, batch = self.launcher.world_size, self.train.batch_size
        require(
            batch % world == 0,
            f"train.batch_size={batch} does not divide over {world} ranks"
            " (launcher.nodes x launcher.tasks_per_node): choose a multiple",
        )
        micro = self.train.micro_batch
        if micro is not None and micro < batch // world:
            require(
                batch // world % micro == 0,
                f"train.micro_batch={micro} does not divide a rank's share of {batch // world} images"
                f" (train.batch_size={batch} over {world} ranks)",
            )
        require(
            self.micro_batch % 2 == 0 or not (self.data.mixup or self.data.cutmix),
            f"data.mixup and data.cutmix pair pictures: the micro-batch of {self.micro_batch} must be even",
        )
        require(
            self.train.epochs == 0 or self.loss.alpha == 0 or self.teacher.name is not None,
            f"loss.alpha={self.loss.alpha} needs a teacher: set teacher.name, or loss.alpha=0",
        )
        require(
            self.train.epochs > 0 or self.student.checkpoint is not None,
            "train.epochs=0 evaluates a file: set student.checkpoint=FILE",
        )

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
