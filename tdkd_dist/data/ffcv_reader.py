"""Batches from a beton through FFCV: one compiled decoder that carries out the plans of `crops` and `frames`.

FFCV's own random decoders draw from an unseeded generator, its iterator leaves a waiting reader alone with a thread
that has died, and its epochs fix the order at creation. Here a subclass of its decoder reads a plan made beforehand,
and a subclass of its iterator takes any order, hands errors over, and stops when told to.

Shapes: B pictures, H x W pixels, P columns of a plan.
"""

import logging
import queue
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdkd_dist.data.batch import Batch
from tdkd_dist.data.crops import (
    DOWN,
    ERASE_HEIGHT,
    ERASE_LEFT,
    ERASE_TOP,
    ERASE_WIDTH,
    FLIP,
    HEIGHT,
    LEFT,
    PLAN_COLUMNS,
    RIGHT,
    TOP,
    WIDTH,
    CropRule,
    Ints,
)
from tdkd_dist.data.frame_decoder import frame_decoder_class
from tdkd_dist.data.frames import FrameRule
from tdkd_dist.mistakes import Mistake

logger = logging.getLogger(__name__)
STALL_SECONDS = 600.0
"""Longest wait for a batch from a thread that still lives."""
DECODED = PLAN_COLUMNS
"""The column after the plan, where the decoder writes whether it could."""


class FfcvReader:
    """Reads any order of samples from the beton `path`, in batches: by a rule; without one, frames as stored."""

    def __init__(
        self, path: Path, *, batch_size: int, rule: CropRule | FrameRule | None, workers: int, device: torch.device
    ):
        _import_ffcv()
        from ffcv.fields.decoders import IntDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToDevice, ToTensor, ToTorchImage

        self.path, self.rule, self._device = path, rule, device
        on_device = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
        of_pictures = isinstance(rule, CropRule)
        self._decoder = _decoder_class()(rule) if of_pictures else frame_decoder_class()(rule)
        as_images = [ToTorchImage()] if of_pictures else []
        workers = _as_compiled_before(workers)
        with _keep_torch_threads():
            self._loader = Loader(
                str(path),
                batch_size=batch_size,
                num_workers=workers,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                drop_last=False,
                pipelines={
                    "image" if of_pictures else "frames": [self._decoder, ToTensor(), *on_device, *as_images],
                    "label": [IntDecoder(), ToTensor(), *on_device],
                },
            )
        nodes = self._loader.graph.nodes
        self._plan_node = next(node.id for node in nodes if getattr(node, "decoder", None) is self._decoder)
        self._open: Any = None

    def batches(self, order: Ints, epoch: int) -> Generator[Batch]:
        """The samples `order` in batches.

        Raises `Mistake` naming a sample that cannot be decoded, `RuntimeError` when the thread dies or stalls.
        """
        self.close()
        if len(order) == 0:
            return
        threads = torch.get_num_threads()
        plan = None if self.rule is None else self._plan_for(self.rule, epoch)
        if isinstance(self.rule, CropRule):
            # FFCV asks the decoder for its shape whenever it allocates an epoch's buffers.
            self._decoder.size = self.rule.size_at(epoch)
        self._open = iterator = _iterator_class()(self._loader, order, self._plan_node, plan, self._device)
        try:
            for images_BCHW, labels_B1 in iterator:
                # FFCV's thread sets the thread count of the whole process when it starts.
                torch.set_num_threads(threads)
                yield Batch(images_BCHW, labels_B1.flatten())
        finally:
            iterator.close()

    def close(self) -> None:
        """End the iteration under way, if any, and its thread."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _plan_for(self, rule: CropRule | FrameRule, epoch: int) -> Callable[[Ints], Ints]:
        if isinstance(rule, FrameRule):
            return partial(rule.sources, epoch)
        pictures = self._loader.reader.metadata["f0"]

        def plan(indices_B: Ints) -> Ints:
            chosen = pictures[indices_B]
            return rule.plan(epoch, indices_B, chosen["height"].astype(np.int64), chosen["width"].astype(np.int64))

        return plan


def _import_ffcv() -> None:
    """Import FFCV without the 6 s that numba takes to compile dictionaries of its own, of which FFCV fills one with two
    numbers and reads them in Python. Nor does torch keep to one thread afterwards, as FFCV wants it.
    """
    import numba.typed

    own, numba.typed.Dict = numba.typed.Dict, dict
    try:
        with _keep_torch_threads():
            import ffcv.fields.rgb_image  # noqa: F401
    finally:
        numba.typed.Dict = own


_workers_compiled_for: int | None = None


def _as_compiled_before(workers: int) -> int:
    """The number of threads to use: numba fails, or never ends, when a process compiles for one thread and for many."""
    global _workers_compiled_for
    if _workers_compiled_for is None:
        _workers_compiled_for = workers
    if (workers > 1) == (_workers_compiled_for > 1):
        return workers
    logger.warning("data.workers=%d: this process loads with %d, so does this loader", workers, _workers_compiled_for)
    return _workers_compiled_for


class _keep_torch_threads:  # noqa: N801 -- used like a function
    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)


@cache
def _decoder_class() -> Any:
    from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

    decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
    move, mirror, erase = Compiler.compile(_move), Compiler.compile(_mirror), Compiler.compile(_erase)

    class PlanDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
        """Decodes, then follows the plan in its second buffer."""

        def __init__(self, rule: CropRule):
            super().__init__()
            self.size, self.fill = rule.size, np.array(rule.fill, dtype=np.uint8)

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            shape = (self.size, self.size, 3)
            state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1"))
            return state, (
                AllocationQuery(shape, np.dtype("u1")),
                AllocationQuery((PLAN_COLUMNS + 1,), np.dtype("i8")),
            )

        def generate_code(self) -> Callable[..., Any]:
            read, threads = self.memory_read, Compiler.get_iterator()
            jpeg, fill = IMAGE_MODES["jpg"], self.fill

            def decode(batch_indices: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
                images, plans = memory
                for i in threads(len(batch_indices)):
                    field = metadata[batch_indices[i]]
                    height, width = np.uint32(field["height"]), np.uint32(field["width"])
                    data = read(field["data_ptr"], storage_state)
                    plan, image = plans[i], images[i]
                    if field["mode"] == jpeg:
                        # FFCV keeps a full-size buffer for every sample of every batch ahead, 1 GB for 256 pictures.
                        pixels = np.empty(height * width * np.uint32(3), np.uint8)
                        plan[DECODED] = decode_jpeg(
                            data, pixels, height, width, height, width, 0, 0, 1, 1, False, False
                        )
                    else:
                        pixels = data
                        plan[DECODED] = 0
                    top, left = plan[TOP], plan[LEFT]
                    picture = pixels.reshape(height, width, 3)
                    resize(picture, top, top + plan[HEIGHT], left, left + plan[WIDTH], image)
                    if plan[DOWN] != 0 or plan[RIGHT] != 0:
                        move(image, plan[DOWN], plan[RIGHT])
                    if plan[FLIP] != 0:
                        mirror(image)
                    if plan[ERASE_HEIGHT] != 0:
                        erase(image, plan[ERASE_TOP], plan[ERASE_LEFT], plan[ERASE_HEIGHT], plan[ERASE_WIDTH], fill)
                return images[: len(batch_indices)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    return PlanDecoder


def _move(image_HWC: Any, down: int, right: int) -> None:
    """Move the picture in place, black behind it (compiled)."""
    height, width, channels = image_HWC.shape
    old = image_HWC.copy()
    for y in range(height):
        for x in range(width):
            inside = 0 <= y - down < height and 0 <= x - right < width
            for c in range(channels):
                image_HWC[y, x, c] = old[y - down, x - right, c] if inside else 0


def _mirror(image_HWC: Any) -> None:
    """Swap left and right in place (compiled)."""
    height, width, channels = image_HWC.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(channels):
                left = image_HWC[y, x, c]
                image_HWC[y, x, c] = image_HWC[y, width - 1 - x, c]
                image_HWC[y, width - 1 - x, c] = left


def _erase(image_HWC: Any, top: int, left: int, height: int, width: int, fill_C: Any) -> None:
    """Fill a box in place (compiled)."""
    for y in range(top, top + height):
        for x in range(left, left + width):
            for c in range(3):
                image_HWC[y, x, c] = fill_C[c]


@cache
def _iterator_class() -> Any:
    from ffcv.loader.epoch_iterator import EpochIterator

    class GuardedIterator(EpochIterator):  # type: ignore[misc]
        """FFCV's loader thread, with a plan for each batch, an ear for its errors and an end."""

        def __init__(
            self, loader: Any, order: Ints, plan_node: int, plan: Callable[[Ints], Ints] | None, device: torch.device
        ):
            self._plan_node, self._plan, self._device = plan_node, plan, device
            self._error: BaseException | None = None
            super().__init__(loader, order)

        def run(self) -> None:
            try:
                if self._device.type == "cuda":
                    # A thread starts on device 0, and would open a context there, half a gigabyte for every rank.
                    torch.cuda.set_device(self._device)
                    # The buffers may be memory that kernels of the last epoch still read.
                    self.current_stream.synchronize()
                super().run()
            except BaseException as error:
                self._error = error

        def run_pipeline(self, b_ix: int, batch_indices: Ints, batch_slot: int, cuda_event: Any) -> Any:
            if self.terminate_event.is_set():
                # FFCV looks at the event only when its queue stays full, and would read the epoch to its end.
                raise StopIteration
            if self._plan is not None:
                plans_BP = self.memory_allocations["operation"][self._plan_node][1][batch_slot][: len(batch_indices)]
                made_BP = self._plan(batch_indices)
                plans_BP[:, : made_BP.shape[1]] = made_BP
            result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
            if self._device.type == "cuda":
                # FFCV would only make the GPU wait, and could then overwrite pinned memory that is still being sent.
                # Here, and not where the batch is taken: the training loop must not wait.
                self.cuda_streams[batch_slot].synchronize()
            broken = batch_indices[plans_BP[:, -1] != 0] if self._plan is not None else []
            if len(broken):
                raise Mistake(f"sample {broken[0]} cannot be decoded; see tools/write_beton.py --verify")
            return result

        def __next__(self) -> Any:
            item = self._wait()
            if item is None:
                self.close()
                raise StopIteration
            _, result = item
            return result

        def _wait(self) -> Any:
            deadline = time.monotonic() + STALL_SECONDS
            while True:
                alive = self.is_alive()
                try:
                    return self.output_queue.get(timeout=1.0 if alive else 0.0)
                except queue.Empty:
                    path = self.loader.fname
                    if not alive:
                        kind = Mistake if isinstance(self._error, Mistake) else RuntimeError
                        raise kind(f"{path}: {self._error}") from self._error
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"{path}: no batch for {STALL_SECONDS:.0f} s") from None

        def close(self) -> None:
            super().close()
            self.closed = True
            while self.is_alive():
                # The thread may be waiting for room in the queue.
                with self.output_queue.mutex:
                    self.output_queue.queue.clear()
                    self.output_queue.not_full.notify()
                self.join(timeout=0.1)

    return GuardedIterator
