"""The same pictures in every form that ImageNet and CIFAR are handed out in. Oracles: torchvision, Pillow."""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdkd_dist.config import DataConfig
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.loaders import make_val_loader
from tdkd_dist.data.sources import open_source
from tdkd_dist.data.sources.classes import InTeacherOrder, check_order
from tdkd_dist.data.sources.source import Source
from tdkd_dist.mistakes import Mistake

SYNSETS = ["n01440764", "n01443537", "n02123045"]
PER_CLASS = 4


def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 90, 2)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


PICTURES = [
    (synset, f"{synset}_{i}.JPEG", jpeg(10 * c + i)) for c, synset in enumerate(SYNSETS) for i in range(PER_CLASS)
]
LABELS = [SYNSETS.index(synset) for synset, _, _ in PICTURES]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_folder(root: Path) -> Source:
    for synset, name, data in PICTURES:
        (root / synset).mkdir(parents=True, exist_ok=True)
        (root / synset / name).write_bytes(data)
    return open_source(root)


def make_split_folder(root: Path) -> Source:
    make_folder(root / "val")
    return open_source(root, "val")


def make_train_tar(root: Path) -> Source:
    # The outer tar lists the classes in another order than the sorted one: the labels must not follow it.
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in reversed(SYNSETS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for _, name, data in [p for p in PICTURES if p[0] == synset]:
                    add(tar, name, data)
            add(outer, f"{synset}.tar", inner.getvalue())
    return open_source(root / "ILSVRC2012_img_train.tar")


# The devkit numbers the classes in an order of its own.
DEVKIT_ID = {"n01440764": 2, "n01443537": 3, "n02123045": 1}


def make_val_tar(root: Path) -> list[tuple[str, str, bytes]]:
    shuffled = [PICTURES[i] for i in np.random.default_rng(0).permutation(len(PICTURES))]
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in np.random.default_rng(1).permutation(len(shuffled)):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", shuffled[i][2])
    return shuffled


def make_val_with_devkit(root: Path) -> Source:
    savemat = pytest.importorskip("scipy.io").savemat
    shuffled = make_val_tar(root)
    rows = np.zeros(4, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)])
    for row, (synset, number) in zip(rows, [*DEVKIT_ID.items(), ("n00001740", 4)], strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["num_children"] = number, synset, 0
    mat = io.BytesIO()
    savemat(mat, {"synsets": rows})
    truth = "\n".join(str(DEVKIT_ID[synset]) for synset, _, _ in shuffled) + "\n"
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return open_source(root / "ILSVRC2012_img_val.tar")


def make_val_with_list(root: Path) -> Source:
    shuffled = make_val_tar(root)
    (root / "synsets.txt").write_text("\n".join(synset for synset, _, _ in shuffled))
    return open_source(root / "ILSVRC2012_img_val.tar", labels=root / "synsets.txt")


def make_flat_folder_with_csv(root: Path) -> Source:
    (root / "flat").mkdir()
    lines = ["ImageId,PredictionString"]
    for i, (synset, _, data) in enumerate(PICTURES):
        (root / "flat" / f"ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(data)
        lines.insert(1, f"ILSVRC2012_val_{i + 1:08d},{synset} 85 1 499 272 {synset} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines))
    return open_source(root / "flat", labels=root / "LOC_val_solution.csv")


def make_parquet(root: Path) -> Source:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for shard in range(2):
        part = PICTURES[shard::2]
        rows = [{"bytes": data, "path": name} for _, name, data in part]
        table = pyarrow.table({"image": rows, "label": [SYNSETS.index(synset) for synset, _, _ in part]})
        for split in ("train", "validation"):
            parquet.write_table(table, root / f"{split}-{shard:05d}-of-00002.parquet", row_group_size=4)
    return open_source(root, "val")


def make_webdataset(root: Path) -> Source:
    for shard in range(2):
        with tarfile.open(root / f"train-{shard:04d}.tar", "w") as tar:
            for i, (synset, name, data) in list(enumerate(PICTURES))[shard::2]:
                add(tar, f"{i:06d}.cls", str(SYNSETS.index(synset)).encode())
                add(tar, f"{i:06d}.jpg", data)
                add(tar, f"{i:06d}.json", json.dumps({"filename": name}).encode())
    return open_source(root, "train")


FORMATS: list[Callable[[Path], Source]] = [
    make_folder,
    make_split_folder,
    make_train_tar,
    make_val_with_devkit,
    make_val_with_list,
    make_flat_folder_with_csv,
    make_parquet,
    make_webdataset,
]


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__[5:])
def test_every_format_gives_the_same_labelled_pictures(make: Callable[[Path], Source], tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    source = make(tmp_path)
    if make is not make_folder:
        make_folder(tmp_path / "reference")
    folder = datasets.ImageFolder(str(tmp_path if make is make_folder else tmp_path / "reference"))
    expected = sorted((label, np.asarray(picture).tobytes()) for picture, label in folder)
    found = sorted((int(label), source.read(i).tobytes()) for i, label in enumerate(source.labels))
    assert found == expected
    assert source.class_names == folder.classes
    assert len({source.name(i) for i in range(len(source.labels))}) == len(PICTURES)


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__[5:])
def test_sources_survive_pickling(make: Callable[[Path], Source], tmp_path: Path) -> None:
    source = make(tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.read(3), source.read(3))
    assert copy.signature() == source.signature()


def test_what_holds_both_sets_is_never_read_as_one(tmp_path: Path) -> None:
    """Test pictures would go into training, or the sets be taken for classes."""
    for split in ("train", "test"):
        make_folder(tmp_path / "tree" / split)
        (tmp_path / "flat").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "flat" / f"{split}-000.tar", "w") as tar:
            add(tar, "0.cls", b"0")
            add(tar, "0.jpg", PICTURES[0][2])
    for folder in ("tree", "flat"):
        with pytest.raises(Mistake, match=f"{folder}: holds train and test; say --split"):
            open_source(tmp_path / folder)
        assert len(open_source(tmp_path / folder, "train").labels) in (1, len(PICTURES))


def cifar_arrays(count: int, classes: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, classes, count).tolist()


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def cifar_python(root: Path, hundred: bool, images: np.ndarray, labels: list[int]) -> Path:
    path = root / ("cifar-100-python.tar.gz" if hundred else "cifar-10-python.tar.gz")
    folder = "cifar-100-python" if hundred else "cifar-10-batches-py"
    key, parts = (b"fine_labels", ["train"]) if hundred else (b"labels", [f"data_batch_{i}" for i in range(1, 6)])
    names = [b"class %d" % i for i in range(100 if hundred else 10)]
    with tarfile.open(path, "w:gz") as tar:
        for part, which in zip(parts, np.array_split(np.arange(len(images)), len(parts)), strict=True):
            batch = {b"data": planes(images[which]), key: [labels[i] for i in which], b"filenames": [b"x"] * len(which)}
            add(tar, f"{folder}/{part}", pickle.dumps(batch, protocol=2))
        meta = {b"fine_label_names" if hundred else b"label_names": names}
        add(tar, f"{folder}/{'meta' if hundred else 'batches.meta'}", pickle.dumps(meta, protocol=2))
    return path


def cifar_binary(root: Path, hundred: bool, images: np.ndarray, labels: list[int]) -> Path:
    path = root / ("cifar-100-binary.tar.gz" if hundred else "cifar-10-binary.tar.gz")
    parts = ["train.bin"] if hundred else [f"data_batch_{i}.bin" for i in range(1, 6)]
    names = "\n".join(f"class{i}" for i in range(100 if hundred else 10))
    with tarfile.open(path, "w:gz") as tar:
        for part, which in zip(parts, np.array_split(np.arange(len(images)), len(parts)), strict=True):
            coarse = [np.zeros((len(which), 1), np.uint8)] if hundred else []
            fine = np.array(labels, np.uint8)[which][:, None]
            add(tar, f"cifar/{part}", np.concatenate([*coarse, fine, planes(images[which])], axis=1).tobytes())
        add(tar, f"cifar/{'fine_label_names.txt' if hundred else 'batches.meta.txt'}", names.encode())
    return path


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("make", [cifar_python, cifar_binary])
@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar(make: Callable[..., Path], hundred: bool, unpacked: bool, tmp_path: Path) -> None:
    images, labels = cifar_arrays(23, 100 if hundred else 10)
    path = make(tmp_path, hundred, images, labels)
    if unpacked:
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "out", filter="data")
        path = next((tmp_path / "out").iterdir())
    source = open_source(path, "train")
    assert np.array_equal(np.stack([source.read(i) for i in range(23)]), images)
    assert source.labels.tolist() == labels
    assert source.class_names is not None
    assert len(source.class_names) == (100 if hundred else 10)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return print, ("executed",)

    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "batches.meta"]:
            add(tar, name, pickle.dumps({b"data": Evil()}))
    with pytest.raises(ValueError, match=r"builtins.print"):
        open_source(tmp_path / "cifar-10-python.tar.gz", "train")


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(head + array.tobytes())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(suffix: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.arange(5, dtype=np.uint8))
    source = open_source(tmp_path, "val")
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(source.read(2), np.stack([images[2]] * 3, axis=-1))


# ---- what users get wrong ----


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "n01").mkdir()
    with pytest.raises(ValueError, match="n01: no pictures"):
        open_source(tmp_path)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "1", "RGBA", "I;16"])
def test_other_colour_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture = Image.new(mode, (9, 7))
    path = tmp_path / "a" / ("x.JPEG" if mode in ("L", "CMYK") else "x.png")
    picture.save(path)
    assert np.array_equal(open_source(tmp_path).read(0), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("content", [b"just some text", b"", PICTURES[0][2][:300]], ids=["text", "empty", "cut off"])
def test_what_is_no_picture_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.JPEG").write_bytes(content)
    with pytest.raises(ValueError, match=r"a/broken\.JPEG: not a readable picture"):
        open_source(tmp_path).read(0)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("make", [make_train_tar, make_webdataset, make_parquet])
def test_truncated_archives_are_named(make: Callable[[Path], Source], keep: float, tmp_path: Path) -> None:
    make(tmp_path)
    path = sorted(p for p in tmp_path.iterdir() if p.suffix in (".tar", ".parquet"))[0]
    # tar ends in up to 10 KB of zeros, which may be missing without harm.
    content = path.read_bytes().rstrip(b"\0") if path.suffix == ".tar" else path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
        open_source(path).labels.sum()


def test_validation_labels_that_do_not_fit(tmp_path: Path) -> None:
    make_val_tar(tmp_path)
    tar = tmp_path / "ILSVRC2012_img_val.tar"
    with pytest.raises(ValueError, match="--labels"):
        open_source(tar)
    (tmp_path / "short.txt").write_text("n01440764\n")
    with pytest.raises(ValueError, match="1 labels for 12 pictures"):
        open_source(tar, labels=tmp_path / "short.txt").labels.sum()
    (tmp_path / "names.txt").write_text("tench\n" * len(PICTURES))
    with pytest.raises(ValueError, match="tench is not a synset"):
        open_source(tar, labels=tmp_path / "names.txt").labels.sum()


def test_a_missing_split_is_asked_for(tmp_path: Path) -> None:
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="--split train or --split val"):
        open_source(tmp_path)


# ---- class order ----


class Thousand:
    """A source of ImageNet's classes, one picture each, numbered in an order of its own."""

    kind, path, lossless = "test", Path("x"), False

    def __init__(self, names: list[str]):
        self.class_names, self.labels = names, np.arange(1000)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> np.ndarray:
        return np.zeros((1, 1, 3), np.uint8)

    def signature(self) -> str:
        return ""


def test_imagenet_classes_get_timms_order() -> None:
    from timm.data import ImageNetInfo

    right = list(ImageNetInfo("imagenet-1k").label_names())
    wrong = [right[i] for i in np.random.default_rng(0).permutation(1000)]
    ordered = InTeacherOrder(Thousand(wrong))
    assert ordered.class_names == right
    assert [right[label] for label in ordered.labels] == wrong
    untouched = Thousand(right)
    assert InTeacherOrder(untouched).labels is untouched.labels
    check_order(right, "data.train")
    check_order(["cat", "dog"], "data.train")
    check_order(None, "data.train")
    with pytest.raises(ValueError, match=r"data.train: its class \d+ is n"):
        check_order(wrong, "data.train")


def test_a_reader_of_pictures_numbers_the_classes_as_write_beton_does(tmp_path: Path) -> None:
    """WebDataset shards in an order of their own, once through a beton and once picture by picture."""
    from timm.data import ImageNetInfo

    right = list(ImageNetInfo("imagenet-1k").label_names())
    given = np.random.default_rng(0).permutation(1000)
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for label, at in enumerate(given):
            for suffix, content in (("png", picture.getvalue()), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{right[at]}_{label}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path / "val.tar", "val")
    assert [right[label] for label in source.labels] == [right[at] for at in given]
    written = write(source, tmp_path / "val.beton")
    assert written.class_names == right
    common = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "workers": 1, "batch_size": 500}
    data = DataConfig(val=str(tmp_path / "val.tar"), format="imagefolder", image_size=4)
    loader = make_val_loader(data, **common)
    assert torch.cat([labels.clone() for _, labels in loader]).tolist() == given.tolist()
    loader.close()
