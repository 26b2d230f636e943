"""Choosing when to stop, on held-out samples, with a bound on what it costs.

Shapes: T timesteps, B samples, K classes, C candidates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tdkd_dist.anytime import AnytimeStudent, ExitRule, Kind
from tdkd_dist.config import DataConfig
from tdkd_dist.data.beton.manifest import check_beton
from tdkd_dist.data.loaders import ValLoader, make_val_loader, open_pictures, signature_of
from tdkd_dist.losses import ensembles
from tdkd_dist.metrics import label_rank
from tdkd_dist.mistakes import Mistake, require

CONFIDENCE = 0.95
CANDIDATES = 400
"""Thresholds that are tried, at equal shares of the samples' scores."""
FALL = 0.85
"""By how much less is asked after each further timestep. What is unsure at t = 1 seldom gets much surer, so that one
threshold for all sends it to T; and there is less to win by going on. Chosen on other students than those reported on
(docs/results/anytime.md), and before any calibration: fitted to the samples, it would spoil the bound."""


def calibrate(
    logits_TBK: Tensor,
    labels_B: Tensor,
    kind: Kind,
    *,
    max_drop: float | None = None,
    mean_timesteps: float | None = None,
    fall: float = FALL,
) -> ExitRule:
    """The rule of a kind with the smallest mean t whose accuracy is at most `max_drop` points below that at T.

    Held-out samples alone may be given: none that was trained on, none that is reported on. With 95 % confidence the
    loss on such samples is within `max_drop`: candidates are tried from the one that never stops early towards the
    laxest, and the first whose bound is beyond ends the search, so that no correction for their number is needed (fixed
    sequence testing, as in Angelopoulos et al. 2021). The bound is that of `bound_drop`. Or, with `mean_timesteps`,
    the most accurate one whose mean t is at most that; nothing is then promised of its accuracy. From one timestep to
    the next thresholds are multiplied by `fall` (1: one for all), those of entropy divided.

    Raises `Mistake` if neither or both are given, or if nothing but running all T timesteps is within them.
    """
    T, B, _ = logits_TBK.shape
    require((max_drop is None) != (mean_timesteps is None), "give either max_drop or mean_timesteps")
    require(max_drop is None or abs(max_drop) <= 100, f"max_drop={max_drop}: must be points of accuracy, at most 100")
    require(
        mean_timesteps is None or mean_timesteps < float("inf"),
        f"mean_timesteps={mean_timesteps}: must be a number of timesteps",
    )
    require(
        len(labels_B) == B and B > 0, f"{B} samples and {len(labels_B)} labels: as many are wanted, and one at least"
    )
    means_TBK = ensembles(logits_TBK)
    correct_TB = label_rank(means_TBK, labels_B) == 0
    require(0 < fall <= 1, f"fall={fall}: must be above 0 and at most 1")
    measured_TB = ExitRule(kind, 0).measure(means_TBK)
    tried = [ExitRule(kind, threshold, T) for threshold in candidates(kind, measured_TB, fall)]
    exits = [rule.decide_measured(measured_TB) for rule in tried]
    chosen: int | None = None
    for k in sorted(range(len(tried)), key=lambda k: -float(exits[k].double().mean())):
        mean_t = float(exits[k].double().mean())
        if mean_timesteps is not None:
            better = chosen is None or _top1(correct_TB, exits[k]) > _top1(correct_TB, exits[chosen])
            chosen = k if mean_t <= mean_timesteps and better else chosen
        elif max_drop is not None:
            if bound_drop(correct_TB, exits[k]) > max_drop:
                break
            chosen = k
    if chosen is None:
        raise Mistake(_nothing(max_drop, mean_timesteps, B))
    found = describe(correct_TB, exits[chosen])
    aim = {"max_drop": max_drop, "mean_timesteps_at_most": mean_timesteps, "confidence": CONFIDENCE}
    return ExitRule(kind, tried[chosen].threshold, T, aim | found)


def candidates(kind: Kind, measured_TB: Tensor, fall: float = FALL) -> list[float | tuple[float, ...]]:
    """Thresholds to try: numbers of steps for patience, else quantiles of the scores before T, and the strictest."""
    T = len(measured_TB)
    if kind == "patience":
        return [float(k) for k in range(T, -1, -1)]
    factors_T = (1 / fall if kind == "entropy" else fall) ** np.arange(T)
    # What the first threshold must be for a sample to stop at t.
    firsts = measured_TB[: max(T - 1, 1)].double().numpy() / factors_T[: max(T - 1, 1), None]
    quantiles = np.quantile(firsts, np.linspace(0, 1, CANDIDATES), method="inverted_cdf")
    strictest = 0.0 if kind == "entropy" else 1.0
    if fall == 1:
        return sorted({*np.clip(quantiles, 0, 1).tolist(), strictest})
    falling = {tuple(np.clip(first * factors_T, 0, 1).tolist()) for first in quantiles}
    return sorted({*falling, (strictest,) * T})


def bound_drop(correct_TB: Tensor, exit_B: Tensor, confidence: float = CONFIDENCE) -> float:
    """An upper bound in points of what stopping early costs, against T, at that confidence.

    Of the discordant samples alone: those that only T gets right, minus those that only the early exit does. Each
    share has its exact one-sided bound (Clopper and Pearson 1934), at half the risk each.
    """
    early_B, late_B = _at(correct_TB, exit_B), correct_TB[-1]
    lost, won, B = int((late_B & ~early_B).sum()), int((early_B & ~late_B).sum()), len(exit_B)
    if bool((exit_B == len(correct_TB)).all()):
        return 0.0
    return 100 * (_clopper_pearson(lost, B, confidence)[1] - _clopper_pearson(won, B, confidence)[0])


def describe(correct_TB: Tensor, exit_B: Tensor) -> dict[str, Any]:
    """Accuracy under a rule and at T, the bound, mean and histogram of t: what a rule's file keeps."""
    T = len(correct_TB)
    return {
        "samples": len(exit_B),
        "top1": _top1(correct_TB, exit_B),
        "top1_at_T": 100 * float(correct_TB[-1].double().mean()),
        "drop_bound": bound_drop(correct_TB, exit_B),
        "mean_timesteps": float(exit_B.double().mean()),
        "histogram": [100 * float((exit_B == t).double().mean()) for t in range(1, T + 1)],
    }


def _at(correct_TB: Tensor, exit_B: Tensor) -> Tensor:
    return correct_TB.gather(0, (exit_B - 1).unsqueeze(0)).squeeze(0)


def _top1(correct_TB: Tensor, exit_B: Tensor) -> float:
    return 100 * float(_at(correct_TB, exit_B).double().mean())


def _clopper_pearson(count: int, of: int, confidence: float) -> tuple[float, float]:
    """A two-sided interval whose sides have half the risk each."""
    from scipy.stats import beta

    risk = (1 - confidence) / 2
    low = beta.ppf(risk, count, of - count + 1) if count else 0.0
    return float(low), float(beta.ppf(1 - risk, count + 1, of - count)) if count < of else 1.0


def _nothing(max_drop: float | None, mean_timesteps: float | None, samples: int) -> str:
    if mean_timesteps is not None:
        return f"mean_timesteps={mean_timesteps}: no threshold stops so early; the least is 1"
    return (
        f"max_drop={max_drop}: with {samples} held-out samples not even running all timesteps can be shown to lose so"
        " little; give more samples, or allow more"
    )


def read_logits(
    student: AnytimeStudent, heldout: Path, *, split: str | None = None, workers: int = 2, batch_size: int = 128
) -> tuple[Tensor, Tensor, str]:
    """The logits `[T, B, K]` of held-out pictures, their labels `[B]`, and the data's signature.

    `heldout` is a beton or anything else that pictures are read from. Raises `Mistake`, naming it.
    """
    loader, signature = open_labelled(student, heldout, split=split, workers=workers, batch_size=batch_size)
    logits, labels = [], []
    try:
        theirs, own = loader.class_names, student.class_names
        require(
            theirs is None or own is None or list(theirs) == list(own),
            f"HELDOUT={heldout}: its classes ({_listed(theirs)}) are not the student's ({_listed(own)})",
        )
        for images_BCHW, labels_B in loader:
            logits.append(student.all_logits(images_BCHW).cpu())
            labels.append(labels_B.cpu().clone())  # FFCV writes the next batches where these lie
    finally:
        loader.close()
    return torch.cat(logits, dim=1), torch.cat(labels), signature


def open_labelled(
    student: AnytimeStudent,
    path: Path,
    *,
    name: str = "HELDOUT",
    split: str | None = None,
    workers: int = 2,
    batch_size: int = 128,
) -> tuple[ValLoader, str]:
    """Pictures cropped as the student wants them, with labels; and the data's signature.

    As for `read_logits`; `name` is what the user knows `path` by.
    """
    is_beton = path.is_file() and path.suffix in (".beton", ".ffcv")
    part: Literal["train", "val"] = "train" if split == "train" else "val"
    data = DataConfig(
        train=str(path),
        val=str(path),
        format="ffcv" if is_beton else "imagefolder",
        image_size=student.image_size,
        crop_pct=student.crop_pct,
        frames=student.frames.frames if student.frames else None,
        frame_choice=student.frames.choice if student.frames else "first",
        crop="none",
    )
    try:
        if is_beton:
            signature = check_beton(path, name).signature
        else:
            signature = signature_of(open_pictures(str(path), f"data.{part}"))
        loader = make_val_loader(
            data, batch_size=batch_size, rank=0, world_size=1, device=student.device, workers=workers, split=part
        )
    except Mistake as mistake:
        raise Mistake(str(mistake).replace(f"data.{part}=", f"{name}=", 1)) from mistake
    return loader, signature


def _listed(names: Sequence[str] | None) -> str:
    names = names or []
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
