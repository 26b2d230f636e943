"""What batch statistics of their own for every timestep would be worth to a trained student.

    python tools/bench/timestep_statistics.py STUDENT TRAIN VAL [--images 3000] [--markdown FILE]

Batch norms pool their statistics over timesteps, though the first one fires least. Here each batch norm behind the stem
gets a mean and a variance for each timestep, measured on training pictures with all layers before it corrected as well;
weights and biases stay. Rows: the student as it is; the first timestep alone, whose two vectors could be
`neuron.first_scale` and `v_init`; all timesteps. Accuracy on VAL, where nothing was chosen.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from arguments import check_counts, check_outputs
from torch import Tensor, nn

from tdkd_dist.anytime import AnytimeStudent
from tdkd_dist.calibration import open_labelled
from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.losses import ensembles
from tdkd_dist.mistakes import require

BATCH = 250
Batch = tuple[Tensor, Tensor]
"""Normalised images and labels."""


class TimestepStatistics(nn.Module):
    """A batch norm whose statistics may be those of each timestep: `[T*B, C, H, W]` in and out, T-major."""

    def __init__(self, bn: nn.BatchNorm2d, num_timesteps: int) -> None:
        super().__init__()
        self.bn, self.num_timesteps = bn, num_timesteps
        self.measuring = False
        self.own: tuple[int, ...] = ()
        """The timesteps, from 0, that have their own statistics."""
        self.sums = torch.zeros(2, num_timesteps, bn.num_features)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        """As the batch norm, but for the timesteps in `own`; measuring, every timestep by this batch's statistics."""
        parts = []
        for t, part in enumerate(x.chunk(self.num_timesteps)):
            mean, var = self.bn.running_mean, self.bn.running_var
            if self.measuring:
                var, mean = torch.var_mean(part, (0, 2, 3), correction=0)
                self.sums[:, t] += torch.stack([mean, var])
            elif t in self.own:
                mean, var = self.sums[:, t] / self.batches
            parts.append(nn.functional.batch_norm(part, mean, var, self.bn.weight, self.bn.bias, eps=self.bn.eps))
        self.batches += self.measuring
        return torch.cat(parts)


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: measure(parse(argv)), "timestep_statistics")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--images", type=int, default=3000, help="of the training set, drawn at random")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_args(argv)
    check_counts(args, "images")
    check_outputs(args, "markdown")
    return args


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Measure, and print the table. Raises `Mistake`."""
    student = AnytimeStudent.load(args.student)
    require(student.frames is None, f"{args.student}: a student of recordings; this takes pictures")
    model, T = student.model, student.num_timesteps
    layers = give_statistics(model, T)
    seen, val = training_batches(student, args.train, args.images), list(batches(student, args.val))
    rows = {"pooled over timesteps": accuracy(model, val)}
    for layer in layers:
        layer.measuring = True
    for images, _ in seen:
        model(images)
    for layer in layers:
        layer.measuring = False
    for name, own in (("its own at t = 1", (0,)), ("its own at every t", tuple(range(T)))):
        for layer in layers:
            layer.own = own
        rows[name] = accuracy(model, val)
    head = f"| statistics | {' | '.join(f't = {t + 1}' for t in range(T))} |\n|---{'|---' * T}|\n"
    publish(
        head + "\n".join(f"| {name} | {' | '.join(f'{v:.2f}' for v in row)} |" for name, row in rows.items()),
        args.markdown,
    )


def give_statistics(model: nn.Module, num_timesteps: int) -> list[TimestepStatistics]:
    """Put one around every batch norm but the stem's, which reads the same at every timestep."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and n != "bn1"}
    layers = {name: TimestepStatistics(bn, num_timesteps) for name, bn in found.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers.values())


def batches(student: AnytimeStudent, path: Path) -> Iterable[Batch]:
    """The set's pictures as the student wants them."""
    loader, _ = open_labelled(student, path, batch_size=BATCH)
    try:
        for images, labels in loader:
            yield student.prepare(images.clone()), labels.clone().flatten().long()
    finally:
        loader.close()


def training_batches(student: AnytimeStudent, path: Path, count: int) -> list[Batch]:
    """So many pictures in random order: a file may hold one class after the other."""
    images, labels = (torch.cat(parts) for parts in zip(*batches(student, path), strict=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return [(images[part], labels[part]) for part in torch.split(order, BATCH) if len(part) == min(BATCH, len(order))]


def accuracy(model: nn.Module, data: list[Batch]) -> list[float]:
    """Top-1 after t = 1..T, in per cent."""
    right = [(ensembles(model(images)).argmax(-1) == labels).float().sum(1) for images, labels in data]
    return (100 * torch.stack(right).sum(0) / sum(len(labels) for _, labels in data)).tolist()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
