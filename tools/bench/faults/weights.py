"""Weights of students and teachers: damaged files, metadata of other kinds, pickles of other things."""

import argparse
import io
import json
import random
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from faults.data import damaged
from tdkd_dist.config import DataConfig, StudentConfig, TeacherConfig
from tdkd_dist.students import create_student
from tdkd_dist.teachers import create_teacher
from tdkd_dist.weights import load_student, load_weights, save_student

SMALL = StudentConfig(model="sew_resnet8", num_classes=3, num_timesteps=2, width=4)
ODD: tuple[Any, ...] = (None, True, -1, 0, 10**12, 1.5, 1e308, "", "x", "../x", "\x1b[2J", [], [[]], [1], {}, {"a": 1})


@lru_cache
def student_bytes() -> bytes:
    """A student's file."""
    import tempfile

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        state = create_student(SMALL).state_dict()
        save_student(path, state, SMALL, input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.2,) * 3)
        return path.read_bytes()


def with_metadata(content: bytes, draw: random.Random) -> bytes:
    """The file, of whose student's description one or two values are others."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    description = json.loads(header["__metadata__"]["student"])
    for _ in range(draw.randint(1, 2)):
        part = description["neuron"] if draw.random() < 0.3 and isinstance(description["neuron"], dict) else description
        part[draw.choice([*part, "more"])] = draw.choice(ODD)
    text = draw.choice((json.dumps(description), json.dumps(draw.choice(ODD)), json.dumps(description)))
    header["__metadata__"]["student"] = text
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + size :]


def students(draw: random.Random, folder: Path) -> None:
    """A student's safetensors file."""
    path = folder / "x.safetensors"
    content = student_bytes()
    path.write_bytes(damaged(draw, content) if draw.random() < 0.5 else with_metadata(content, draw))
    load_student(path)


def pickles(draw: random.Random, folder: Path) -> None:
    """Files of `torch.save`: wrappers, other objects, other bytes."""
    net = create_student(SMALL)
    tensors: Any = dict(net.state_dict())
    if draw.random() < 0.5:
        tensors[draw.choice(list(tensors))] = draw.choice((*ODD, torch.zeros(3), torch.zeros((), dtype=torch.bool)))
    extra = draw.choice((argparse.Namespace(lr=1), Path("x"), 3, None, {1, 2}, lambda: None))
    content: Any = draw.choice((tensors, {"net": tensors}, {"state_dict": tensors, "x": extra}, [tensors], extra))
    stream = io.BytesIO()
    try:
        torch.save(content, stream)
    except Exception:  # a function has no pickle
        return
    path = folder / "x.pth"
    path.write_bytes(stream.getvalue() if draw.random() < 0.5 else damaged(draw, stream.getvalue()))
    load_weights(net, path, "student.checkpoint")


@lru_cache
def teacher_bytes() -> bytes:
    """A teacher's file, as a run writes it."""
    import tempfile

    config = StudentConfig(model="test_resnet", num_classes=3, num_timesteps=1)  # timm's smallest
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        state = create_student(config).state_dict()
        save_student(path, state, config, input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.2,) * 3)
        return path.read_bytes()


def teachers(draw: random.Random, folder: Path) -> None:
    """A teacher's file whose metadata say how its images are normalised."""
    path = folder / "x.safetensors"
    content = teacher_bytes()
    path.write_bytes(damaged(draw, content) if draw.random() < 0.4 else with_metadata(content, draw))
    config = TeacherConfig("test_resnet", checkpoint=str(path))
    create_teacher(config, DataConfig(), num_classes=3, in_chans=3)


AREAS = {"students": students, "pickles": pickles, "teachers": teachers}
