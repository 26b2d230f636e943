"""What stopping early is worth: accuracy, images a second and latency of every way of answering, in the same run.

    python tools/bench/bench_anytime.py STUDENT DATA --exit RULE.json
    python tools/bench/bench_anytime.py STUDENT DATA --exit RULE.json --compile --markdown anytime.md

DATA holds the pictures that are reported on, with labels; the rule must have been chosen on others. They are decoded
once and kept in memory as uint8, so that no loader is measured: `--images` of them, or all (ImageNet's take 7.5 GB).

The contestants are in `anytime_contestants.py`, all in this process with the same threads. Each first answers all
pictures: that is its accuracy, and warms it up. Then a round goes through all of them, so that a machine that slows
down slows all: a ratio is one of times of the same round. A figure is the median over rounds, the percentiles of
latencies too, taken within each round.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anytime_contestants import Contestant, contestants
from arguments import check_counts, check_device, check_outputs
from rounds import say
from step import processor
from torch import Tensor

from tdkd_dist.anytime import AnytimeStudent, ExitRule
from tdkd_dist.calibration import candidates, open_labelled
from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.exits import SCORED
from tdkd_dist.files import write_json
from tdkd_dist.losses import ensembles
from tdkd_dist.memory import keep_freed_memory
from tdkd_dist.metrics import label_rank
from tdkd_dist.mistakes import require
from tdkd_dist.run.figures import draw_early_exit

LATENCIES = (("batch_p50_ms", "batch_p99_ms"), ("single_p50_ms", "single_p99_ms"))
"""Names of the figures of a batch and of an image alone: median and 99th percentile."""


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: measure(parse(argv)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("data", type=Path, help="a beton, or whatever tools/write_beton.py reads")
    parser.add_argument("--exit", type=Path, required=True, metavar="RULE.json")
    parser.add_argument("--images", type=int, metavar="N", help="the first N only")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=20, help="in a round")
    parser.add_argument("--singles", type=int, default=200, help="images in a round that are answered alone")
    parser.add_argument("--compile", action="store_true", help="also compiled contestants; takes minutes to start")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: one a core)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw accuracy against mean timesteps")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    check_counts(options, "images", "batch", "rounds", "batches", "singles", "threads")
    check_device(options.device)
    check_outputs(options, "json", "figure", "markdown")
    return options


def measure(options: argparse.Namespace) -> None:
    """The measurement. Raises `Mistake`."""
    keep_freed_memory()
    rule = ExitRule.load(options.exit)
    student = AnytimeStudent.load(options.student, options.exit, device=options.device)
    images_BCHW, labels_B = read_images(student, rule, options)
    torch.set_num_threads(options.threads)
    T, model = student.num_timesteps, student.model
    ways = contestants(model, rule, T, student.device, compiled=options.compile)
    if options.figure:
        draw(options.figure, student, rule, images_BCHW, labels_B)
    results = {way.title: describe(way, *answer_all(way, images_BCHW, options.batch), labels_B) for way in ways}
    compete(ways, results, images_BCHW, options)
    facts = {
        "student": options.student.name,
        "timesteps": T,
        "rule": f"{rule.kind} {', '.join(f'{rule.threshold_at(t):.4g}' for t in range(1, max(T, 2)))}",
        "images": len(labels_B),
        "size": student.image_size,
        "batch": options.batch,
        "rounds": options.rounds,
        "hardware": hardware(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    fixed = {way.title: results[way.title] for way in ways if way.is_fixed}
    baseline = min(fixed, key=lambda title: statistics.median(fixed[title]["seconds"]))
    publish(as_markdown(facts, results, baseline), options.markdown)
    if options.json:
        write_json(options.json, facts | {"baseline": baseline, "results": results})


def read_images(student: AnytimeStudent, rule: ExitRule, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Pictures as uint8 `[B, C, H, W]` on the device, and labels `[B]`. Raises `Mistake`, naming the file."""
    loader, signature = open_labelled(student, options.data, name="DATA", batch_size=options.batch)
    images, labels, count = [], [], 0
    try:
        require(
            rule.calibration.get("signature") != signature,
            f"--exit {options.exit}: was chosen on {options.data} itself; report on other pictures",
        )
        for images_BCHW, labels_B in loader:
            images.append(images_BCHW.clone())  # FFCV writes the next batches where these lie
            labels.append(labels_B.clone())
            count += len(labels_B)
            if options.images is not None and count >= options.images:
                break
    finally:
        loader.close()
    images_BCHW, labels_B = torch.cat(images)[: options.images], torch.cat(labels)[: options.images].cpu()
    known = student.model.num_classes
    require(int(labels_B.max()) < known, f"{options.data}: has more classes than the student, {known}")
    return images_BCHW, labels_B


def draw(path: Path, student: AnytimeStudent, rule: ExitRule, images_BCHW: Tensor, labels_B: Tensor) -> None:
    """The figure: every threshold of the rules that have one, on the pictures that are reported on."""
    logits_TBK = torch.cat([student.all_logits(part).cpu() for part in torch.split(images_BCHW, 500)], dim=1)
    means_TBK = ensembles(logits_TBK)
    correct_TB = label_rank(means_TBK, labels_B) == 0

    def point(exit_B: Tensor) -> tuple[float, float]:
        right_B = correct_TB.gather(0, (exit_B - 1).unsqueeze(0))
        return float(exit_B.double().mean()), 100 * float(right_B.double().mean())

    curves: dict[str, list[tuple[float, float]]] = {}
    for kind in SCORED:
        measured_TB = ExitRule(kind, 0).measure(means_TBK)
        tried = candidates(kind, measured_TB)
        curves[kind] = [point(ExitRule(kind, threshold).decide_measured(measured_TB)) for threshold in tried]
    fixed = (100 * correct_TB.double().mean(1)).tolist()
    draw_early_exit(path, fixed, curves, point(rule.decide(logits_TBK)))


def answer_all(way: Contestant, images_BCHW: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The classes of all images and how many timesteps were run for them, `[B]`."""
    say(f"{way.title}: answering {len(images_BCHW)} pictures")
    answers = [way.answer(part) for part in torch.split(images_BCHW, batch)]
    way.answer(images_BCHW[:1])
    classes_B, timesteps_B = (torch.cat(parts).cpu() for parts in zip(*answers, strict=True))
    return classes_B, timesteps_B


def describe(way: Contestant, classes_B: Tensor, timesteps_B: Tensor, labels_B: Tensor) -> dict[str, Any]:
    """What is known of a contestant before any time is taken."""
    right = 100 * float((classes_B == labels_B).double().mean())
    return {
        "top1": right if way.is_trained else None,
        "mean_timesteps": float(timesteps_B.double().mean()) if way.is_trained else None,
        "seconds": [],
    } | {key: [] for keys in LATENCIES for key in keys}


def compete(
    ways: list[Contestant], results: dict[str, dict[str, Any]], images_BCHW: Tensor, options: argparse.Namespace
) -> None:
    """Add each round's figures: `seconds` an image in batches; percentiles of the latency of batches and of singles."""
    parts = list(torch.split(images_BCHW[: options.batch * options.batches], options.batch))
    parts = parts[:-1] if len(parts) > 1 and len(parts[-1]) < options.batch else parts
    singles = torch.split(images_BCHW[: options.singles], 1)
    for k in range(1, options.rounds + 1):
        for way in ways:
            result = results[way.title]
            way.answer(parts[0])  # takes back the caches
            batch_ms = [timed(way, part) for part in parts]
            result["seconds"].append(sum(batch_ms) / 1000 / sum(map(len, parts)))
            way.answer(singles[0])
            for keys, found_ms in zip(LATENCIES, (batch_ms, [timed(way, one) for one in singles]), strict=True):
                for key, percent in zip(keys, (50, 99), strict=True):
                    result[key].append(float(np.percentile(found_ms, percent)))
        say(f"round {k} of {options.rounds}")


def timed(way: Contestant, images_BCHW: Tensor) -> float:
    """Milliseconds until the classes are here."""
    started = time.perf_counter()
    way.answer(images_BCHW)[0].cpu()
    return 1000 * (time.perf_counter() - started)


def hardware(device: str) -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores, {processor()}"


def as_markdown(facts: dict[str, Any], results: dict[str, dict[str, Any]], baseline: str) -> str:
    """The table."""
    lines = [
        f"{facts['student']}, T = {facts['timesteps']}, rule {facts['rule']}, {facts['images']} images of"
        f" {facts['size']} px; {facts['hardware']}, {facts['threads']} threads, torch {facts['torch']};"
        f" {facts['rounds']} rounds. Speed is compared with the fastest that runs all T, {baseline}.",
        "",
        f"| answer | top-1, % | mean t | images/s, batch {facts['batch']} | speed / all T (least to most)"
        f" | batch {facts['batch']}: p50, p99, ms | batch 1: p50, p99, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, result in results.items():
        ratios = [base / own for base, own in zip(results[baseline]["seconds"], result["seconds"], strict=True)]
        cells = [
            title,
            "-" if result["top1"] is None else f"{result['top1']:.2f}",
            "-" if result["mean_timesteps"] is None else f"{result['mean_timesteps']:.2f}",
            f"{1 / statistics.median(result['seconds']):.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            *(", ".join(f"{statistics.median(result[key]):.1f}" for key in keys) for keys in LATENCIES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
