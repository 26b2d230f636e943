"""Write a student in a format that other programs run: python tools/export.py STUDENT DEST --format onnx|program|nir

    python tools/export.py runs/x/student.safetensors student.onnx --format onnx       and student_step.onnx
    python tools/export.py runs/x/student.safetensors student.pt2 --format program     and student_step.pt2
    python tools/export.py runs/x/student.safetensors student.nir --format nir         one timestep, hard reset

What was written is read back by other programs' code (onnxruntime; a process without this package; NIRTorch) and must
give the student's logits on real pictures; otherwise nothing is left under DEST, and the exit status is 1. The pictures
are --pictures, or the validation set of the run that STUDENT lies in, or parts of a photograph. docs/export.md says
what each format can hold.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tdkd_dist.command_line import Parser, check_input, check_output, check_timesteps, run_tool
from tdkd_dist.files import whole
from tdkd_dist.mistakes import Mistakes

if TYPE_CHECKING:
    from torch import Tensor

    from tdkd_dist.students.base import SpikingNet

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "program": (), "nir": ("nir", "nirtorch")}
LEAST = 5
"""Pictures, in batches of 1, 3 and the rest."""


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    return run_tool(lambda: export(parse(argv)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("student", type=Path, metavar="STUDENT")
    parser.add_argument("dest", type=Path, metavar="DEST")
    parser.add_argument("--format", required=True, choices=tuple(NEEDS))
    parser.add_argument("--timesteps", type=int, metavar="T", help="so many (default: the student's own)")
    parser.add_argument("--pictures", type=Path, nargs="+", default=[], help="files, a folder of classes, or a beton")
    parser.add_argument("--count", type=int, default=16, help=f"of pictures, at least {LEAST}")
    parser.add_argument("--dt", type=float, default=1e-4, help="of NIR: the reader's time step in seconds")
    parser.add_argument("--host-stem", action="store_true", help="of NIR: the graph starts after the stem")
    args = parser.parse_args(argv)
    found = Mistakes()
    for path in (args.student, *args.pictures):
        found.gather(check_input, path)
    found.gather(check_output, args.dest, "DEST")
    found.require(
        args.dest.resolve() != args.student.resolve(), f"{args.dest}: is the student's own file; name another"
    )
    found.gather(check_timesteps, args.timesteps)
    found.require(LEAST <= args.count <= 10_000, f"--count {args.count}: must be in {LEAST} to 10,000")
    found.require(0 < args.dt <= 1, f"--dt {args.dt}: must be above 0 and at most 1")
    found.require(not args.host_stem or args.format == "nir", "--host-stem: only of --format nir")
    lacking = [name for name in NEEDS[args.format] if importlib.util.find_spec(name) is None]
    found.require(not lacking, f"--format {args.format} needs {', '.join(lacking)}: pip install -e '.[export]'")
    found.tell()
    return args


def export(args: argparse.Namespace) -> int:
    """Write, read back, compare; the exit status. Raises `Mistake`."""
    import torch

    from tdkd_dist.anytime import AnytimeStudent
    from tdkd_dist.data.normalise import as_input
    from tdkd_dist.export import agreement, nir, plain

    student = AnytimeStudent.load(args.student, num_timesteps=args.timesteps)
    model, T = student.model, student.num_timesteps
    model.set_num_timesteps(T)
    if args.format == "nir":
        nir.refuse(model, args.host_stem)
    pictures, where = agreement.real_pictures(student, args.student, args.pictures, args.count)
    images = as_input(student.prepare(pictures), T)
    with torch.no_grad():
        own, exact = model(images), agreement.exact(model, images)
    folded = plain.fold_batch_norms(model)
    with ExitStack() as written:
        for path, reader, write, read in writers(args, folded, T if images.ndim == 5 else None):
            unproven = written.enter_context(whole(path))
            write(unproven)
            found = agreement.compare(exact, own, read(unproven, agreement.batches(images)))
            if not found.holds:
                print(f"error: {path} was not written: read back by {reader}, {found}", file=sys.stderr)
                raise SystemExit(1)
            print(f"{path}: {unproven.stat().st_size / 1e6:,.1f} MB; read back by {reader}, {found}", flush=True)
    print(f"pictures: {where}")
    return 0


Write = Callable[[Path], None]
Read = Callable[[Path, "list[Tensor]"], "Tensor"]


def writers(args: argparse.Namespace, folded: "SpikingNet", frames: int | None) -> list[tuple[Path, str, Write, Read]]:
    """Of each file: its path, who reads it back, how it is written, and how it is read back."""
    from tdkd_dist.export import nir, onnx, program

    T, dest = folded.num_timesteps, args.dest
    step = dest.with_name(f"{dest.stem}_step{dest.suffix}")
    if args.format == "nir":

        def read(path: Path, batches: "list[Tensor]") -> "Tensor":
            seen = [nir.after_stem(folded, x) for x in batches] if args.host_stem else batches
            return nir.read_back(path, seen, T)

        write = partial(nir.write, folded, dt=args.dt, host_stem=args.host_stem)
        return [(dest, f"NIRTorch {version('nirtorch')} in float64", write, read)]
    if args.format == "program":
        reader = "a process without this package"
        return [
            (dest, reader, partial(program.write, folded, frames=frames), program.read_back),
            (step, reader, partial(program.write_step, folded), partial(program.read_back_step, num_timesteps=T)),
        ]
    reader = f"onnxruntime {version('onnxruntime')}"
    return [
        (dest, reader, partial(onnx.write, folded, frames=frames), onnx.read_back),
        (step, reader, partial(onnx.write_step, folded), partial(onnx.read_back_step, num_timesteps=T)),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
