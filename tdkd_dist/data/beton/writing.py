"""Writing FFCV files.

FFCV's own `DatasetWriter` waits for ever when one of its processes dies, and its files differ from run to run. Here
processes only encode, and one process writes in order: the same source and options give the same
bytes, and an error has a place to go.

Shapes: T frames, C polarities, H and W pixels.
"""

import errno
import os
import signal
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.beton.layout import (
    ALLOCATION,
    COUNT_TYPES,
    FRAMES_SAMPLE,
    HEADER,
    MODE_JPEG,
    MODE_RAW,
    PAGE_SIZE,
    SAMPLE,
    VERSION,
    FrameLayout,
    Tables,
    data_start,
    descriptors,
    read_tables,
)
from tdkd_dist.data.beton.manifest import (
    Manifest,
    WriteOptions,
    check_beton,
    compare,
    manifest_path,
    save_manifest,
)
from tdkd_dist.data.crops import uniform_draws
from tdkd_dist.data.sources.source import FrameSource, Image, Source
from tdkd_dist.files import whole
from tdkd_dist.mistakes import Mistake

AnySource = Source | FrameSource
CHUNK = 32
"""Pictures a task: enough to hide the cost of handing it over, few enough that many tasks fit in memory."""


def up_to_date(source: AnySource, dest: Path, options: WriteOptions) -> Manifest | None:
    """The manifest of `dest` if that is a whole beton written from the same source with the same options, else None."""
    try:
        manifest = check_beton(dest, "DEST").manifest
    except Mistake:
        return None
    if manifest is None or (manifest.source_kind, manifest.options) != (source.kind, options):
        return None
    return manifest if manifest.source_signature == source.signature() else None


def write(
    source: AnySource,
    dest: Path | str,
    options: WriteOptions | None = None,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write `source` as the beton `dest`, with its manifest; `progress(done, total)` is called now and then.

    The file appears under its name only when it is complete and has been read back. Raises `Mistake` naming the
    picture that cannot be read, or the file that cannot be written.
    """
    dest, options = Path(dest), options or WriteOptions()
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with whole(dest) as partial:
            with open(partial, "w+b") as file:
                manifest = _write_fitting(file, source, options, workers, progress or (lambda done, total: None))
            check_written(partial, manifest)
            manifest_path(dest).unlink(missing_ok=True)
        save_manifest(manifest, dest)
    except OSError as error:
        hint = "; nothing was written" if error.errno == errno.ENOSPC else ""
        raise Mistake(f"{dest}: {error.strerror or error}{hint}") from error
    return manifest


def check_written(path: Path, manifest: Manifest, most: int = 1000) -> None:
    """Read the tables back, and at most `most` pictures, against the manifest. Raises `Mistake`."""
    tables = read_tables(path)
    compare(manifest, tables, path.stat().st_size)
    some = np.unique(np.linspace(0, len(tables.samples) - 1, most).astype(np.int64))
    pixels = np.memmap(path, mode="r")
    for index in some:
        ptr, size = tables.place(index)
        if zlib.crc32(pixels[ptr : ptr + size].tobytes()) != tables.checksums[index]:
            raise Mistake(f"{path}: sample {index} does not read back as it was written: is the disk sound?")


def choose(labels: NDArray[np.int64], options: WriteOptions) -> NDArray[np.int64]:
    """Indices of the samples to write: all or a subset, without those set apart, or these alone."""
    chosen = np.arange(len(labels))
    if options.subset is not None:
        subset = options.subset
        chosen = spread(labels, round(len(labels) * subset) if subset < 1 else min(int(subset), len(labels)))
    if options.holdout:
        if options.holdout >= len(chosen):
            raise Mistake(f"--holdout {options.holdout}: there are only {len(chosen)} pictures, and some must be left")
        held = chosen[spread(labels[chosen], options.holdout)]
        chosen = held if options.heldout else np.setdiff1d(chosen, held)
    return chosen


def spread(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Indices of `count` samples, spread evenly over the classes."""
    places = np.linspace(0, len(labels), max(1, count), endpoint=False).astype(np.int64)
    return np.sort(np.argsort(labels, kind="stable")[places])


@dataclass
class _Encoded:
    """A sample as it will lie in the file, or why there is none."""

    index: int
    mode: int = MODE_RAW
    height: int = 0
    width: int = 0
    data: bytes = b""
    checksum: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Number of pixels, and per channel the sum of values, then that of squares, [1 + 2 C]."""
    largest: int = 0
    """Count of events."""
    error: str | None = None


class _TooLarge(Exception):  # noqa: N818 -- no error: a wider type is tried
    """A count does not fit the type that frames are stored as."""


def _write_fitting(
    file: IO[bytes], source: AnySource, options: WriteOptions, workers: int, progress: Callable[[int, int], None]
) -> Manifest:
    """Frames in the narrowest type that holds every count."""
    if not isinstance(source, FrameSource):
        return _write_all(file, source, options, workers, progress, None)
    for dtype in COUNT_TYPES:
        layout = FrameLayout(source.shape, dtype)
        if layout.nbytes > PAGE_SIZE:
            raise Mistake(
                f"{source.path}: frames of {list(source.shape)} counts do not fit a page; take fewer or smaller ones"
            )
        try:
            return _write_all(file, source, options, workers, progress, layout)
        except _TooLarge:
            file.seek(0)
            file.truncate()
    raise Mistake(f"{source.path}: a pixel has more than {np.iinfo(dtype).max:,} events in a frame; take more frames")


def _write_all(
    file: IO[bytes],
    source: AnySource,
    options: WriteOptions,
    workers: int,
    progress: Callable[[int, int], None],
    layout: FrameLayout | None,
) -> Manifest:
    chosen = choose(source.labels, options)
    samples = np.zeros(len(chosen), dtype=SAMPLE if layout is None else FRAMES_SAMPLE)
    checksums = np.zeros(len(chosen), dtype="<u4")
    allocations = np.zeros(len(chosen), dtype=ALLOCATION)
    sums: NDArray[np.float64] | float = 0.0
    skipped, done, end = [], 0, data_start(len(chosen), samples.dtype)
    for step, encoded in enumerate(_encode_all(source, options, layout, chosen, workers)):
        if encoded.error is not None:
            if options.on_error == "stop":
                raise Mistake(encoded.error)
            skipped.append(encoded.error)
            continue
        if layout is not None and encoded.largest > np.iinfo(layout.dtype).max:
            raise _TooLarge
        page_left = PAGE_SIZE - end % PAGE_SIZE
        start = end if len(encoded.data) <= page_left else end + page_left
        file.seek(start)
        file.write(encoded.data)
        end = start + len(encoded.data)
        place = (encoded.mode, encoded.width, encoded.height, start) if layout is None else start
        samples[done] = (place, source.labels[encoded.index])
        allocations[done] = (done, start, len(encoded.data))
        checksums[done] = encoded.checksum
        sums = sums + encoded.sums
        done += 1
        progress(step + 1, len(chosen))
    if done == 0:
        things = "picture" if layout is None else "recording"
        raise Mistake(f"{source.path}: no {things} in it could be read" if skipped else f"{source.path}: no {things}s")
    assert not isinstance(sums, float)
    table_ptr = -(-end // PAGE_SIZE) * PAGE_SIZE
    header = np.array((VERSION, 2, PAGE_SIZE, done, table_ptr), dtype=HEADER)
    tables = Tables(header, descriptors(layout), samples[:done], checksums[:done], allocations[:done])
    _write_tables(file, tables)
    return _describe(source, options, tables, sums, skipped)


def _write_tables(file: IO[bytes], tables: Tables) -> None:
    file.seek(int(tables.header["alloc_table_ptr"]))
    file.write(tables.allocations.tobytes())
    file.seek(0)
    for part in (tables.header, tables.descriptors, tables.samples, tables.checksums):
        file.write(part.tobytes())
    file.flush()
    os.fsync(file.fileno())


def _describe(
    source: AnySource, options: WriteOptions, tables: Tables, sums: NDArray[np.float64], skipped: list[str]
) -> Manifest:
    labels, names = tables.samples["label"], source.class_names
    classes = len(names) if names is not None else int(labels.max()) + 1
    scale, frames = 255, None
    if isinstance(source, FrameSource):
        assert tables.frames is not None
        scale, frames = 1, source.about | asdict(tables.frames)
    count, (mean, square) = sums[0], np.split(sums[1:] / sums[0], 2)
    assert count > 0
    std = np.sqrt(np.maximum(0, square - mean**2))
    return Manifest(
        source_kind=source.kind,
        source=str(source.path),
        source_signature=source.signature(),
        options=options,
        num_samples=len(labels),
        num_classes=classes,
        class_names=list(names) if names is not None else None,
        class_histogram=np.bincount(labels, minlength=classes).tolist(),
        mean=[round(float(m) / scale, 6) for m in mean],
        std=[round(float(s) / scale, 6) for s in std],
        file_size=int(tables.header["alloc_table_ptr"]) + tables.allocations.nbytes,
        tables_sha256=tables.sha256(),
        skipped=skipped,
        frames=frames,
    )


def _encode_all(
    source: AnySource,
    options: WriteOptions,
    layout: FrameLayout | None,
    chosen: NDArray[np.int64],
    workers: int,
) -> Iterator[_Encoded]:
    """The chosen pictures in order, encoded by `workers` processes (1: by this one) a bounded way ahead."""
    if workers == 1:
        for index in chosen:
            yield _encode(source, options, layout, int(index))
        return
    import cv2

    # Here, not in the processes: OpenCV hangs when a fork of a process that has used its threads changes their number.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    chunks = (chosen[i : i + CHUNK].tolist() for i in range(0, len(chosen), CHUNK))
    waiting: deque[Future[list[_Encoded]]] = deque()
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(source, options, layout))
    try:
        # The first task starts the processes: a Ctrl-C at that moment must not find them before _start_worker has run.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            waiting.append(pool.submit(_encode_chunk, next(chunks, [])))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) >= 3 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise Mistake("a process that encodes pictures was killed; is there memory for --workers?") from error
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(threads)


_worker: tuple[AnySource, WriteOptions, FrameLayout | None]


def _start_worker(source: AnySource, options: WriteOptions, layout: FrameLayout | None) -> None:
    global _worker
    # The pool ends the others with SIGTERM when one is killed, and reads no more: one that went on, by a handler of the
    # parent's, would wait for ever to hand over its pictures.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _worker = source, options, layout


def _encode_chunk(indices: list[int]) -> list[_Encoded]:
    return [_encode(*_worker, index) for index in indices]


def _encode(source: AnySource, options: WriteOptions, layout: FrameLayout | None, index: int) -> _Encoded:
    try:
        sample = source.read(index)
    except Mistake as error:
        return _Encoded(index, error=str(error))
    if isinstance(source, FrameSource):
        assert layout is not None
        return _encode_frames(sample, layout, index)
    return _encode_picture(source, _shrink(sample, options.max_side), options, index)


def _encode_frames(counts_TCHW: NDArray[Any], layout: FrameLayout, index: int) -> _Encoded:
    """The bytes of one recording's frames, as FFCV's `NDArrayField` has them."""
    assert counts_TCHW.shape == layout.shape
    data = counts_TCHW.astype(layout.dtype).tobytes()
    values = counts_TCHW.astype(np.float64).transpose(1, 0, 2, 3).reshape(layout.shape[1], -1)
    sums = np.concatenate([[values.shape[1]], values.sum(1), np.square(values).sum(1)])
    return _Encoded(index, data=data, checksum=zlib.crc32(data), sums=sums, largest=int(counts_TCHW.max(initial=0)))


def _encode_picture(source: Source, pixels: Image, options: WriteOptions, index: int) -> _Encoded:
    """One picture as FFCV's `RGBImageField` has it."""
    import cv2

    # A hash of the index, not a running generator: the choice must not depend on the number of workers.
    share = 0.0 if source.lossless else options.jpeg_share
    jpeg = uniform_draws(0, 0, np.array([index]), 1)[0, 0] < share or pixels.nbytes > PAGE_SIZE
    data = _as_jpeg(pixels, options.quality) if jpeg else pixels.tobytes()
    height, width = pixels.shape[:2]
    if len(data) > PAGE_SIZE:
        return _Encoded(index, error=f"{source.name(index)}: {width}x{height} does not fit a page; set --max-side")
    mean, std = cv2.meanStdDev(pixels)
    count = height * width
    sums = np.concatenate([[count], count * mean[:, 0], count * (std[:, 0] ** 2 + mean[:, 0] ** 2)])
    return _Encoded(index, MODE_JPEG if jpeg else MODE_RAW, height, width, data, zlib.crc32(data), sums)


def _as_jpeg(pixels: Image, quality: int) -> bytes:
    import cv2

    written, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert written
    return data.tobytes()


def _shrink(pixels: Image, max_side: int) -> Image:
    """As FFCV's `max_resolution`, but a thin picture keeps one pixel of its shorter side."""
    import cv2

    height, width = pixels.shape[:2]
    if max_side == 0 or max(height, width) <= max_side:
        return pixels
    scale = max_side / max(height, width)
    size = max(1, int(scale * width)), max(1, int(scale * height))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
