"""FFCV's compiled loop over frames of event recordings: what `frames.FrameRule` says, carried out on the stored counts.

Shapes: S frames stored, T frames seen, C polarities, H, W pixels, N = H * W, P columns of a plan.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from tdkd_dist.data.frames import FrameRule, bilinear, groups


@cache
def frame_decoder_class() -> Any:
    """A decoder of FFCV's array field, built with a `FrameRule` or None."""
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.libffcv import memcpy
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

    copy, place = Compiler.compile(memcpy), Compiler.compile(_place)

    class FrameDecoder(NDArrayDecoder):  # type: ignore[misc]
        """Frames by a rule, which follows the plan in its second buffer; without one as they are stored.

        FFCV's own gives the last batch of an epoch the length of the others.
        """

        def __init__(self, rule: FrameRule | None) -> None:
            super().__init__()
            self.rule = rule

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            if self.rule is None:
                state, query = super().declare_state_and_memory(previous_state)
                return state, (query, AllocationQuery((1,), np.dtype("i8")))
            size = self.rule.size
            shape, dtype = (self.rule.frames, self.field.shape[1], size, size), np.dtype("f4")
            state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
            return state, (AllocationQuery(shape, dtype), AllocationQuery((size * size + 1,), np.dtype("i8")))

        def generate_code(self) -> Callable[..., Any]:
            read, threads, rule = self.memory_read, Compiler.get_iterator(), self.rule
            if rule is None:

                def stored(batch_indices: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
                    frames, _ = memory
                    for i in threads(len(batch_indices)):
                        copy(read(metadata[batch_indices[i]], storage_state), frames[i].view(np.uint8))
                    return frames[: len(batch_indices)]

                stored.is_parallel = True  # type: ignore[attr-defined]
                return stored

            (S, C, H, W), dtype = self.field.shape, self.field.dtype
            rows, columns = bilinear(H, rule.size), bilinear(W, rule.size)
            parts = groups(S, rule.frames, rule.choice)

            def decode(batch_indices: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
                frames, plans = memory
                for i in threads(len(batch_indices)):
                    counts = read(metadata[batch_indices[i]], storage_state).view(dtype).reshape(S, C, H * W)
                    place(counts, W, rows, columns, parts, plans[i], frames[i])
                    plans[i][-1] = 0
                return frames[: len(batch_indices)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    return FrameDecoder


def _place(counts_SCN: Any, width: Any, rows: Any, columns: Any, parts_T2: Any, plan_P: Any, out_TCHW: Any) -> None:
    """Each pixel of each frame from where the plan says, resized on the way (compiled)."""
    top, bottom, low = rows
    left, right, far = columns
    T, C, size = out_TCHW.shape[0], out_TCHW.shape[1], out_TCHW.shape[2]
    corners, weights = np.empty((size * size, 4), np.int64), np.empty((size * size, 2), np.float32)
    kept, count = np.empty(size * size, np.int64), 0
    for n in range(size * size):
        if plan_P[n] >= 0:
            y, x = plan_P[n] // size, plan_P[n] % size
            corners[count, 0], corners[count, 1] = top[y] * width + left[x], top[y] * width + right[x]
            corners[count, 2], corners[count, 3] = bottom[y] * width + left[x], bottom[y] * width + right[x]
            weights[count, 0], weights[count, 1] = low[y], far[x]
            kept[count] = n
            count += 1
    one, out_TCN = np.float32(1), out_TCHW.reshape(T, C, size * size)
    out_TCN[:] = 0
    for t in range(T):
        for s in range(parts_T2[t, 0], parts_T2[t, 1]):
            for c in range(C):
                plane, out = counts_SCN[s, c], out_TCN[t, c]
                for k in range(count):
                    wy, wx = weights[k, 0], weights[k, 1]
                    above = (one - wx) * plane[corners[k, 0]] + wx * plane[corners[k, 1]]
                    below = (one - wx) * plane[corners[k, 2]] + wx * plane[corners[k, 3]]
                    out[kept[k]] += (one - wy) * above + wy * below
