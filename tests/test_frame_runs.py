"""Frames of event recordings through beton, loaders, networks, validation and any-time inference.

Shapes: B samples, T frames, S of them stored, C polarities, H, W pixels, K classes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import student

from tdkd_dist.anytime import AnytimeStudent, ExitRule
from tdkd_dist.config import Config, DataConfig, StudentConfig
from tdkd_dist.data.beton.manifest import read_manifest
from tdkd_dist.data.beton.verify import verify
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.frames import FrameRule
from tdkd_dist.data.loaders import make_train_loader, make_val_loader
from tdkd_dist.data.mixing import Mixer
from tdkd_dist.data.normalise import Normalise, as_input
from tdkd_dist.data.sources.source import FrameSource
from tdkd_dist.losses import ensembles
from tdkd_dist.mistakes import Mistake
from tdkd_dist.teachers import Teacher
from tdkd_dist.validate import validate
from tdkd_dist.weights import load_student, save_student

CPU = torch.device("cpu")


class Recordings(FrameSource):
    """Frames that were made up."""

    kind, about, class_names = "made up", {"framing": "4 frames by number"}, ("left", "right")
    labels = np.arange(21) % 2

    def __init__(self, path: Path, most: int = 200, shape: tuple[int, ...] = (4, 2, 40, 36)):
        self.path, self.shape = path, shape
        self.counts = np.random.default_rng(0).integers(0, most, (len(self.labels), *shape))

    def name(self, index: int) -> str:
        return f"recording {index}"

    def read(self, index: int) -> np.ndarray:
        return self.counts[index]

    def signature(self) -> str:
        return str(self.counts.sum())


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    write(Recordings(folder), folder / "x.beton")
    return folder / "x.beton"


def config(beton: Path, **data: object) -> DataConfig:
    options = {"frames": 4, "image_size": 32, "crop": "none"} | data
    return DataConfig(train=str(beton), val=str(beton), **options)


def train_loader(data: DataConfig, **options: int):
    where = {"batch_size": 8, "micro_batch": 4, "rank": 0, "world_size": 1, "seed": 5, "workers": 1} | options
    return make_train_loader(data, device=CPU, **where)


@pytest.mark.parametrize(("most", "dtype"), [(256, "|u1"), (257, "<i2"), (1 << 15, "<i2")])
def test_counts_are_kept_exactly_in_the_narrowest_type(most, dtype, tmp_path):
    source = Recordings(tmp_path, most=most)
    source.counts[3, 0, 0, 0, 0] = most - 1
    manifest = write(source, tmp_path / "x.beton", workers=2)
    assert manifest.frames == {"framing": "4 frames by number", "shape": (4, 2, 40, 36), "dtype": dtype}
    np.testing.assert_allclose(manifest.mean, source.counts.mean((0, 1, 3, 4)), atol=1e-5)
    np.testing.assert_allclose(manifest.std, source.counts.std((0, 1, 3, 4)), atol=1e-5)
    again = read_manifest(tmp_path / "x.beton")
    assert again is not None
    assert again.frames == {**manifest.frames, "shape": [4, 2, 40, 36]}
    assert verify(tmp_path / "x.beton")[1] == []
    from tdkd_dist.data.ffcv_reader import FfcvReader

    reader = FfcvReader(tmp_path / "x.beton", batch_size=8, rule=None, workers=1, device=CPU)
    order = np.random.default_rng(1).permutation(21)
    got = [(frames.clone(), labels.clone()) for frames, labels in reader.batches(order, 0)]
    reader.close()
    assert [len(labels) for _, labels in got] == [8, 8, 5]
    assert np.array_equal(torch.cat([frames for frames, _ in got]).numpy(), source.counts[order])
    assert np.array_equal(torch.cat([labels for _, labels in got]).numpy(), source.labels[order])


def test_a_pixel_with_too_many_events_is_a_line(tmp_path):
    source = Recordings(tmp_path)
    source.counts[20, 0, 0, 0, 0] = 1 << 15
    with pytest.raises(Mistake, match="a pixel has more than 32,767 events in a frame"):
        write(source, tmp_path / "x.beton")
    assert not (tmp_path / "x.beton").exists()


def test_a_changed_byte_is_found(beton, tmp_path):
    copy = tmp_path / "x.beton"
    data = bytearray(beton.read_bytes())
    data[check_tables(beton).place(7)[0] + 5] ^= 1
    copy.write_bytes(data)
    copy.with_name("x.beton.json").write_bytes(beton.with_name("x.beton.json").read_bytes())
    problems = verify(copy)[1]
    assert len(problems) == 1
    assert problems[0].startswith("sample 7: its checksum differs")


def check_tables(path: Path):
    from tdkd_dist.data.beton.layout import read_tables

    return read_tables(path)


def test_ranks_and_interruptions_see_the_same_samples(beton):
    data = config(beton, event_augment=True)
    one = train_loader(data)
    whole = [(x.clone(), y.clone()) for x, y in one.epoch(3)]
    later = [(x.clone(), y.clone()) for x, y in one.epoch(3, start_step=1)]
    one.close()
    assert len(whole) == 4
    for (x, y), (again, labels) in zip(whole[2:], later, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
    ranks = []
    for rank in range(2):
        loader = train_loader(data, rank=rank, world_size=2)
        ranks.append([x.clone() for x, _ in loader.epoch(3)])
        loader.close()
    for step in range(2):
        together = torch.cat([x for x, _ in whole[2 * step : 2 * step + 2]])
        assert torch.equal(torch.cat([ranks[0][step], ranks[1][step]]), together)


def test_validation_sees_every_sample_once_without_augmentation(beton):
    loader = make_val_loader(config(beton), batch_size=8, rank=0, world_size=1, device=CPU, workers=1)
    x = torch.cat([frames.clone() for frames, _ in loader])
    loader.close()
    counts = torch.from_numpy(Recordings(beton.parent).counts)
    assert torch.equal(x, FrameRule(4, "first", 32)(counts, 0, np.arange(21)))


@pytest.mark.parametrize("most", [200, 2000])
def test_the_compiled_loop_does_what_the_rule_says(most, tmp_path):
    source = Recordings(tmp_path, most=most)
    write(source, tmp_path / "x.beton")
    data = config(tmp_path / "x.beton", frames=3, frame_choice="regroup", event_augment=True, flip=True)
    loader = train_loader(data)
    got = [x.clone() for x, _ in loader.epoch(2)]
    samples = np.concatenate([loader.samples(2, step) for step in range(2)])
    loader.close()
    rule = FrameRule(3, "regroup", 32, flip=True, events=True, seed=5)
    want = rule(torch.from_numpy(source.counts[samples].astype(np.int16)), 2, samples)
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-6, atol=1e-4)
    assert (want == 0).any()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"frames": None}, "holds 4 frames a sample; set data.frames=4"),
        ({"frames": 5}, "holds 4 frames a sample, fewer than data.frames=5"),
    ],
)
def test_what_does_not_fit_the_beton_is_a_line(beton, changes, line):
    with pytest.raises(Mistake, match=line):
        make_val_loader(config(beton, **changes), batch_size=4, rank=0, world_size=1, device=CPU, workers=1)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"frames": 4}, "data.crop=random_resized: is of pictures; with data.frames set data.crop=none"),
        (
            {"frames": 4, "crop": "none", "cutout": 8},
            "data.cutout=8: is of pictures; with data.frames set data.cutout=0",
        ),
        ({"frames": 4, "crop": "none", "format": "imagefolder"}, "betons alone"),
        ({"event_augment": True}, "set data.frames"),
    ],
)
def test_settings_of_the_other_kind_are_lines(data, line):
    with pytest.raises(Mistake, match=line):
        DataConfig(**data)


def test_timesteps_are_frames():
    data = DataConfig(frames=4, crop="none")
    with pytest.raises(Mistake, match=r"student\.num_timesteps=6: data\.frames=4 are one a timestep"):
        Config(data=data, student=StudentConfig(num_timesteps=6)).check()


def test_mixing_takes_all_frames_of_a_sample_alike():
    x, labels = torch.rand(4, 3, 2, 8, 8), torch.arange(4)
    mixer = Mixer(mixup=1.0, cutmix=0.0, num_classes=4, seed=0, rank=0)
    mixed, soft = mixer(x.clone(), labels, 3, 0)
    share = soft.max(1).values[0]
    for lam in (share, 1 - share):
        if torch.allclose(mixed, lam * x + (1 - lam) * x.flip(0)):
            break
    else:
        pytest.fail("not a mixture of whole samples")
    cut, _ = Mixer(mixup=0.0, cutmix=1.0, num_classes=4, seed=0, rank=0)(x.clone(), labels, 3, 0)
    changed = (cut != x).flatten(3).any(3)
    assert changed.any()
    where = (cut != x)[0]
    assert torch.equal(where.all(0).all(0), where.any(0).any(0))  # one box, in all frames


def test_a_teacher_sees_the_mean_frame():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2 * 4 * 4, 3))
    ones, zeros = (1.0, 1.0), (0.0, 0.0)
    teacher = Teacher(network, student_mean=zeros, student_std=ones, mean=zeros, std=ones)
    frames = torch.rand(5, 4, 2, 4, 4)
    torch.testing.assert_close(teacher(frames), network(frames.mean(1)))


def test_a_student_is_given_a_frame_a_timestep():
    frames = torch.rand(5, 4, 2, 32, 32, dtype=torch.float64)
    net = student("sew_resnet8", in_chans=2, num_timesteps=4)
    with torch.no_grad():
        want = net(torch.stack([frames[:, t] for t in range(4)]))
        assert torch.equal(net(as_input(frames, 4)), want)
    pictures = torch.rand(2, 3, 8, 8)
    assert as_input(pictures, 4) is pictures


def test_validation_counts_the_stem_at_each_step(beton):
    net = student("sew_resnet8", in_chans=2, num_timesteps=4).float()
    batches = [(torch.rand(6, 4, 2, 32, 32) * 3, torch.randint(0, 5, (6,)))]
    normalise = Normalise((0.0,), (1.0,))
    found = validate(net, batches, normalise, num_timesteps=3, device=CPU, activity_images=6)
    with torch.no_grad():
        net.set_num_timesteps(3)
        right = ensembles(net(as_input(batches[0][0], 3))).argmax(-1) == batches[0][1]
    assert found["top1"] == pytest.approx((100 * right.double().mean(1)).tolist())
    stem = 16 * 16 * 9 * 2 * 8  # a 3x3 convolution of stride 2 without padding's share
    per_step = np.diff([0, *found["macs"]])
    assert per_step == pytest.approx([per_step[0]] * 3)
    assert 0.9 * stem < per_step[0] <= stem


def test_stopping_early_compacts_frames():
    net = student("sew_resnet8", in_chans=2, num_timesteps=4).float()
    net.default_cfg = {**net.default_cfg, "input_size": (2, 32, 32), "frames": 4, "mean": (0, 0), "std": (1, 1)}
    counts = torch.randint(0, 4, (16, 4, 2, 40, 36), dtype=torch.uint8)
    every = AnytimeStudent(net).all_logits(counts)
    sureness = ExitRule("margin", 0.0).measure(ensembles(every))
    rule = ExitRule("margin", float(sureness[:2].median()))
    anytime = AnytimeStudent(net, rule)
    found = anytime(counts)
    assert len(set(found.timesteps.tolist())) > 1
    for k in range(16):
        alone = anytime(counts[k : k + 1])
        assert int(alone.timesteps) == int(found.timesteps[k])
        torch.testing.assert_close(alone.logits[0], found.logits[k], rtol=0, atol=1e-5)
    streamed = torch.stack(list(anytime.stream(counts)))
    torch.testing.assert_close(streamed, ensembles(every), rtol=0, atol=1e-5)
    with pytest.raises(Mistake, match="must be counts"):
        anytime(counts[:, :3])
    with pytest.raises(Mistake, match="it was trained on 4 frames"):
        AnytimeStudent(net, num_timesteps=5)


def test_a_file_knows_its_frames(tmp_path):
    net = student("sew_resnet8", in_chans=2, num_timesteps=4).float()
    config = StudentConfig(model="sew_resnet8", num_classes=5, num_timesteps=4, width=8, in_chans=2)
    shown = {"input_size": (2, 32, 32), "mean": (0, 0), "std": (1, 1)}
    save_student(tmp_path / "s.safetensors", net.state_dict(), config, frames=4, frame_choice="regroup", **shown)
    loaded = load_student(tmp_path / "s.safetensors")
    frames, state = torch.randint(0, 4, (4, 3, 2, 32, 32)).float(), None
    with torch.no_grad():
        for frame, want in zip(frames, loaded(frames), strict=True):  # each step looks at its own frame, untold
            logits, state = loaded.step(frame, state)
            torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    assert loaded.default_cfg["frames"] == 4
    anytime = AnytimeStudent.load(tmp_path / "s.safetensors")
    assert anytime.frames == FrameRule(4, "regroup", 32)
