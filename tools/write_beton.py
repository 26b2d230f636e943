"""Write a set of pictures as an FFCV file: python tools/write_beton.py SOURCE DEST [--split train|val] [options].

SOURCE is recognised by what it holds:
  an ImageFolder tree (one folder a class), or a folder with such trees named train and val (with --split)
  ILSVRC2012_img_train.tar; ILSVRC2012_img_val.tar or a flat folder of pictures (with --labels)
  a tar or tgz of such a tree, as Imagenette is handed out
  parquet shards or WebDataset tars, or a folder of them (with --split, by their names)
  a CIFAR-10 or CIFAR-100 archive, python or binary version, packed or unpacked (with --split)
  an idx image file, or a folder of idx files (with --split)
With --frames T, event-camera recordings:
  class folders (or a zip a class) of AEDAT 2.0, 3.1 or 4, of N-MNIST's or N-Caltech101's .bin, of spikingjelly's .npz;
  DVS128 Gesture's recordings with their CSVs; tonic's cached HDF5
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from tdkd_dist.command_line import Parser, check_input, run_tool
from tdkd_dist.data.beton.manifest import Manifest, WriteOptions
from tdkd_dist.data.beton.verify import verify
from tdkd_dist.data.beton.writing import up_to_date, write
from tdkd_dist.data.sources import open_source
from tdkd_dist.data.sources.source import FrameSource, Source
from tdkd_dist.mistakes import Mistake, Mistakes

USAGE = """usage: python tools/write_beton.py SOURCE DEST [--split train|val] [--max-side 500] [--jpeg-share 0.5]
           [--quality 90] [--subset N] [--labels FILE] [--on-error stop|skip] [--holdout N] [--workers N] [--force]
       python tools/write_beton.py SOURCE DEST --frames T [--split train|val] [--split-by official|random|index] [...]
       python tools/write_beton.py --verify FILE
SOURCE: an ImageFolder tree, ILSVRC2012 tars, parquet, WebDataset, CIFAR or idx files; with --frames, event-camera
recordings. --help says more."""


def main(argv: list[str]) -> int:
    """Write or verify; the exit status: 0 done, 1 a broken file, 2 a user's mistake, told in one line."""
    if not argv:
        print(USAGE, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run_tool(lambda: act(parse(argv)), "write_beton")
    except KeyboardInterrupt:
        print("write_beton: interrupted; nothing was written", file=sys.stderr)
        return 130


def act(args: argparse.Namespace) -> int:
    """Write or verify; the exit status."""
    if args.verify is not None:
        return check(args.verify, args.workers)
    for heldout in (False, True) if args.holdout else (False,):
        dest = args.dest.with_name(f"{args.dest.stem}_heldout{args.dest.suffix}") if heldout else args.dest
        report(dest, *run(args, dest, heldout))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    defaults = WriteOptions()
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", nargs="?")
    parser.add_argument("dest", type=Path, metavar="DEST", nargs="?")
    parser.add_argument("--verify", type=Path, metavar="FILE", help="decode every sample of a beton, name broken ones")
    parser.add_argument("--split", choices=("train", "val"), help="which part of a source that holds both")
    parser.add_argument(
        "--labels", type=Path, help="of ILSVRC2012's validation pictures: devkit, synset list, or Kaggle's csv"
    )
    parser.add_argument(
        "--max-side", type=int, default=defaults.max_side, help="shrink pictures to this longer side; 0: never (500)"
    )
    parser.add_argument(
        "--jpeg-share", type=float, default=defaults.jpeg_share, help="share stored as JPEG, the rest raw (0.5)"
    )
    parser.add_argument("--quality", type=int, default=defaults.quality, help="of the JPEGs (90)")
    parser.add_argument("--subset", type=float, help="only so many pictures, or a share below 1, of all classes alike")
    parser.add_argument(
        "--holdout",
        type=int,
        default=0,
        metavar="N",
        help="set N of all classes apart, in DEST with _heldout in its name",
    )
    parser.add_argument("--on-error", default=defaults.on_error, help="at a broken picture: stop, or skip and list it")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    events = parser.add_argument_group("event-camera recordings")
    events.add_argument("--frames", type=int, metavar="T", help="frames of each recording")
    events.add_argument("--by", default="number", help="frames of equal `number` of events (number), or `time`")
    events.add_argument("--window-us", type=int, metavar="N", help="only the first N microseconds of each")
    events.add_argument("--frame-size", type=int, nargs=2, metavar=("H", "W"), help="sums of pixels of the sensor")
    events.add_argument("--sensor", type=int, nargs=2, metavar=("H", "W"), help="where the form doesn't say")
    events.add_argument(
        "--split-by", help="random (10 %%, --split-seed), index (0 to 99), or official, the default where there is one"
    )
    events.add_argument("--split-seed", type=int, default=42, help="of a random split (42)")
    parser.add_argument("--force", action="store_true", help="replace a DEST that was written differently")
    args = parser.parse_args(argv)
    if (args.verify is None) != (args.dest is not None):
        raise Mistake("say SOURCE and DEST, or --verify FILE alone")
    found = Mistakes()
    found.require(args.workers >= 1, f"--workers {args.workers}: must be at least 1")
    if args.frames is None:
        of_events = {"--by": args.by != "number", "--window-us": args.window_us, "--frame-size": args.frame_size}
        of_events |= {"--sensor": args.sensor, "--split-by": args.split_by}
        given = [name for name, value in of_events.items() if value]
        found.require(not given, f"{', '.join(given)}: of event-camera recordings; say --frames T")
    else:
        from tdkd_dist.data.events.framing import FramingRule
        from tdkd_dist.data.events.splits import SplitRule

        with found.gathered():
            args.split_rule = None if args.split_by is None else SplitRule(args.split_by, args.split_seed)
        with found.gathered():
            size = tuple(args.frame_size) if args.frame_size else None
            args.framing = FramingRule(args.frames, args.by, args.window_us, size)
    found.gather(check_input, args.source)
    with found.gathered():
        args.options = WriteOptions(
            args.max_side, args.jpeg_share, args.quality, args.subset, args.on_error, args.holdout
        )
    found.tell()
    return args


def open_any(args: argparse.Namespace) -> Source | FrameSource:
    """The source: pictures, or with --frames recordings as frames. Raises `Mistake`."""
    if args.frames is None:
        return open_source(args.source, args.split, args.labels)
    from tdkd_dist.data.events import open_events
    from tdkd_dist.data.events.framed import FramedSource

    sensor = tuple(args.sensor) if args.sensor else None
    source = open_events(args.source, args.split, args.split_rule, sensor)
    return FramedSource(source, args.framing)


def run(args: argparse.Namespace, dest: Path, heldout: bool) -> tuple[Manifest, str]:
    """Write unless `dest` is already there; the manifest and what was done."""
    options = replace(args.options, heldout=heldout)
    source = open_any(args)
    manifest = up_to_date(source, dest, options)
    if manifest is not None:
        return manifest, "is already there"
    if dest.exists() and not args.force:
        raise Mistake(f"{dest}: exists, but not from this source with these options; --force replaces it")
    progress = Progress()
    try:
        return write(source, dest, options, workers=args.workers, progress=progress), "written"
    finally:
        progress.close()


def check(path: Path, workers: int) -> int:
    """Verify a beton; 1 if a sample is broken."""
    progress = Progress()
    try:
        info, problems = verify(path, workers=workers, progress=progress)
    finally:
        progress.close()
    for problem in problems:
        print(f"{path}: {problem}")
    checked = "decoded and compared with their checksums" if info.manifest else "decoded; no manifest, so no checksums"
    print(f"{path}: {info.num_samples:,} samples {checked}; {len(problems) or 'none'} broken")
    return 1 if problems else 0


def report(dest: Path, manifest: Manifest, done: str) -> None:
    """Say what is there now."""
    things = "pictures" if manifest.frames is None else "recordings"
    print(
        f"{dest} {done}: {manifest.num_samples:,} {things} of {manifest.num_classes} classes,"
        f" {manifest.file_size / 1e6:,.1f} MB, mean {manifest.mean}, std {manifest.std}"
    )
    if manifest.frames is not None:
        print(f"{manifest.frames['framing']}, sensor {manifest.frames['sensor']}, {manifest.frames['split']}")
    if manifest.skipped:
        print(f"{len(manifest.skipped)} broken {things} were skipped; the manifest {dest}.json lists them")


class Progress:
    """A bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(unit=" pictures", disable=not sys.stderr.isatty(), leave=False)
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` pictures are written."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._last >= 10:
            self._last = now
            rate = done / (now - self._start)
            left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate))
            print(f"{done:,} of {total:,} pictures, {rate:,.0f}/s, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
