"""What a recipe's teacher says of the pictures it teaches on: how often it is right, and how sure it is.

    python tools/bench/teacher.py RECIPE [key=value ...] [--images 10000] [--markdown FILE]

Rows: the training pictures, augmented as in the first epoch, and those of validation. Sureness is the mean of the
largest probability, at temperature 1 and at the recipe's, whose probabilities the student learns from; ECE is the
expected calibration error (Guo et al. 2017).

Shapes: B images, K classes.
"""

import argparse
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from arguments import check_counts, check_outputs

from tdkd_dist import distributed
from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.config import Config
from tdkd_dist.data.batch import Batch
from tdkd_dist.data.loaders import make_train_loader, make_val_loader
from tdkd_dist.data.normalise import Normalise
from tdkd_dist.metrics import TimestepCounts
from tdkd_dist.mistakes import require
from tdkd_dist.recipe import load_config
from tdkd_dist.report.tables import markdown
from tdkd_dist.teachers import Teacher, create_teacher, fetch_weights
from tdkd_dist.training.engine import use_bf16

DEVICE = torch.device("cpu")


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: measure(parse(argv)), "teacher")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--images", type=int, default=10_000, help="of each set, at most")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_intermixed_args(argv)
    check_counts(args, "images")
    check_outputs(args, "markdown")
    return args


def measure(args: argparse.Namespace) -> int:
    """Both sets' rows. Raises `Mistake` for a recipe without a teacher, and for what it names and is not there."""
    config = load_config(args.recipe, args.settings)
    require(config.needs_teacher, f"recipe={args.recipe}: it has no teacher")
    workers = config.data.workers or distributed.cores_per_rank()
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "device": DEVICE, "workers": workers}
    val = make_val_loader(config.data, batch_size=config.micro_batch, **options)
    train = make_train_loader(
        config.data,
        batch_size=config.train.batch_size,
        micro_batch=config.micro_batch,
        seed=config.run.seed,
        **options,
    )
    name = config.teacher.name
    assert name is not None
    fetched = config.teacher.pretrained and config.teacher.checkpoint is None
    teacher = create_teacher(
        config.teacher,
        config.data,
        num_classes=config.student.num_classes,
        in_chans=config.student.in_chans,
        weights_file=fetch_weights(name) if fetched else None,
        class_names=val.class_names,
    ).to(memory_format=torch.channels_last)
    tau = f"{config.loss.temperature:g}"
    rows = [["pictures", "images", "top-1", "cross-entropy", "ECE", "sureness", f"sureness at temperature {tau}"]]
    try:
        for pictures, batches in (("train", train.epoch(0)), ("val", iter(val))):
            rows.append([pictures, *sureness(teacher, islice(batches, -(-args.images // config.micro_batch)), config)])
    finally:
        train.close()
        val.close()
    publish(f"{name} of {args.recipe}: {'; '.join(teacher.notes)}\n\n{markdown(rows)}", args.markdown)
    return 0


@torch.no_grad()
def sureness(teacher: Teacher, batches: Iterable[Batch], config: Config) -> tuple[str, str, str, str, str, str]:
    """A row's figures, as text."""
    normalise = Normalise(*config.data.normalisation(config.student.in_chans))
    plain, soft = TimestepCounts(), TimestepCounts()
    for images_BCHW, labels_B in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16(config, DEVICE)):
            logits_BK = teacher(normalise(images_BCHW)).float()
        plain.update(logits_BK.unsqueeze(0), labels_B)
        soft.update(logits_BK.unsqueeze(0) / config.loss.temperature, labels_B)
    found, softened = plain.summary(1, DEVICE), soft.summary(1, DEVICE)
    top1, loss, ece, confidence = (found[key][0] for key in ("top1", "loss", "ece", "confidence"))
    softly = softened["confidence"][0]
    return f"{found['samples']:.0f}", f"{top1:.2f} %", f"{loss:.3f}", f"{ece:.3f}", f"{confidence:.3f}", f"{softly:.3f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
