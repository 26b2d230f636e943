"""Pictures in files of others: forms that public copies have, and what is damaged or hostile, told in a line."""

import io
import json
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tdkd_dist.cluster import preflight
from tdkd_dist.data.beton.layout import DESCRIPTOR, HEADER, SAMPLE
from tdkd_dist.data.beton.manifest import check_beton, manifest_path
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.sources import open_source
from tdkd_dist.mistakes import Mistake
from tdkd_dist.recipe import load_config


def encoded(shade: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, 0, 0)).save(stream, form)
    return stream.getvalue()


def parquet(path: Path, labels: dict[str, list[object]], features: object = None, image: str = "img") -> Path:
    rows = [{"bytes": encoded(k), "path": f"{k}.png"} for k in range(4)]
    table = pa.table({image: rows, **labels})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


NAMES = {"_type": "ClassLabel", "names": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("labels", "features", "image", "want"),
    [
        ({"label": [0, 1, 2, 1]}, {"img": {"_type": "Image"}, "label": NAMES}, "img", [0, 1, 2, 1]),
        ({"label": [0, 1, 2, 1]}, None, "img", [0, 1, 2, 1]),
        ({"coarse_label": [0, 0, 1, 1], "fine_label": [2, 1, 0, 1]}, None, "img", [2, 1, 0, 1]),
        (
            {"coarse_label": [0, 0, 1, 1], "fine_label": [2, 1, 0, 1]},
            {
                "img": {"_type": "Image"},
                "fine_label": NAMES,
                "coarse_label": {"_type": "ClassLabel", "names": ["x", "y"]},
            },
            "img",
            [2, 1, 0, 1],
        ),
        ({"kind": [0, 1, 2, 1]}, {"photo": {"_type": "Image"}, "kind": NAMES}, "photo", [0, 1, 2, 1]),
    ],
)
def test_columns_are_what_the_metadata_call_them(labels, features, image, want, tmp_path):
    source = open_source(parquet(tmp_path / "x.parquet", labels, features, image))
    assert source.labels.tolist() == want
    assert [source.read(k)[0, 0, 0] for k in range(4)] == [0, 1, 2, 3]
    assert source.class_names == (["a", "b", "c"] if features else None)


@pytest.mark.parametrize(
    ("labels", "features", "words"),
    [
        ({"kind": [0, 1, 2, 1]}, None, "none of img, kind is its labels; name the column label"),
        ({"k": [0, 1, 2, 1], "l": [0, 1, 2, 1]}, {"k": NAMES, "l": NAMES}, "k, l could be its labels"),
        ({"label": ["a", "b", "c", "d"]}, None, "its column label holds object, not an integer"),
        ({"label": [0, 1, None, 2]}, None, "its column label holds float64, not an integer"),
        ({"label": [0, 1, -1, 2]}, None, "a label is -1: must be in 0 to"),
        ({"label": [0, 1, 2**62, 2]}, None, f"a label is {2**62}: must be in 0 to"),
    ],
)
def test_columns_that_do_not_tell_are_named(labels, features, words, tmp_path):
    with pytest.raises(Mistake, match=words):
        open_source(parquet(tmp_path / "x.parquet", labels, features)).labels.tolist()


def test_cifars_test_set_is_what_is_validated_on(tmp_path):
    parquet(tmp_path / "train-00000-of-00001.parquet", {"label": [0, 1, 2, 1]})
    parquet(tmp_path / "test-00000-of-00001.parquet", {"label": [2, 2, 2, 2]})
    assert open_source(tmp_path, "val").labels.tolist() == [2, 2, 2, 2]
    assert open_source(tmp_path, "train").labels.tolist() == [0, 1, 2, 1]


@pytest.fixture(params=["tar", "tgz", "tar.gz"])
def tree(request, tmp_path, monkeypatch):
    """Imagenette's form: top folder, split, class."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    path = tmp_path / f"pictures.{request.param}"
    with tarfile.open(path, "w" if request.param == "tar" else "w:gz") as tar:
        for k, name in enumerate(["val/n2/ILSVRC2012_val_9.png", "train/n2/b.png", "train/n1/c.png", "train/n1/a.png"]):
            member = tarfile.TarInfo(f"top/{name}")
            member.size = len(encoded(k))
            tar.addfile(member, io.BytesIO(encoded(k)))
    return path


def test_a_tar_of_class_folders_is_read_in_place(tree):
    train, val = open_source(tree, "train"), open_source(tree, "val")
    assert (train.class_names, train.labels.tolist()) == (["n1", "n2"], [0, 0, 1])
    assert [train.read(k)[0, 0, 0] for k in range(3)] == [3, 2, 1]
    assert train.name(0).endswith("top/train/n1/a.png")
    assert (val.class_names, val.labels.tolist()) == (["n2"], [0])
    assert val.read(0)[0, 0, 0] == 0
    assert train.signature() != val.signature()
    with pytest.raises(Mistake, match="holds train and val; say --split"):
        open_source(tree).labels.tolist()
    again = pickle.loads(pickle.dumps(train))  # as the writer's processes get it
    assert again.read(1)[0, 0, 0] == 2


def test_a_pipe_among_the_pictures_is_not_waited_for(tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "x.png")
    with pytest.raises(Mistake, match=r"a/x\.png: no regular file; remove it"):
        open_source(tmp_path).read(0)
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(Mistake):
        open_source(tmp_path / "pipe.parquet").labels.tolist()


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": np.zeros((2, 3072), np.uint8)},
        {b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "x"]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]},
        {b"data": "x", b"labels": [0, 1]},
        [1, 2],
    ],
)
def test_an_odd_cifar_batch_is_a_line(batch, tmp_path):
    for k in range(1, 6):
        (tmp_path / f"data_batch_{k}").write_bytes(pickle.dumps(batch))
    for meta in ({}, {b"label_names": 7}, {b"label_names": [b"a", b"b"]}):
        (tmp_path / "batches.meta").write_bytes(pickle.dumps(meta))
        with pytest.raises(Mistake) as caught:
            open_source(tmp_path, "train").labels.tolist()
        assert len(caught.value.lines) == 1
        assert str(tmp_path) in str(caught.value)


def test_a_nonsense_label_of_a_beton_is_refused(tmp_path):
    for k in range(4):
        path = tmp_path / "tree" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k))
    beton = tmp_path / "x.beton"
    write(open_source(tmp_path / "tree"), beton)
    assert check_beton(beton, "data.train").largest_label == 1
    content = bytearray(beton.read_bytes())
    at = HEADER.itemsize + 2 * DESCRIPTOR.itemsize + 2 * SAMPLE.itemsize + SAMPLE.fields["label"][1]
    content[at : at + 8] = (2**63 - 1).to_bytes(8, "little")
    beton.write_bytes(content)
    with pytest.raises(Mistake, match=r"^data\.train=\S+: its tables differ"):
        check_beton(beton, "data.train")
    manifest_path(beton).unlink()  # as ffcv-imagenet writes it
    config = load_config("fashion_sew", [f"data.train={beton}", "train.batch_size=2"])
    with pytest.raises(Mistake, match=f"has {2**63} classes and student.num_classes is 10"):
        preflight._check_data(config, "train", preflight.Findings(), False)


def test_many_fields_of_a_beton_are_a_short_line(tmp_path):
    """Found by the campaign: a damaged header promised hundreds, one with a tab in its name."""
    header = np.zeros((), HEADER)
    header["version"], header["num_fields"], header["page_size"] = 2, 300, 1 << 23
    fields = np.zeros(300, DESCRIPTOR)
    fields["name"][0, :3] = np.frombuffer(b"a\tb", np.uint8)
    path = tmp_path / "x.beton"
    path.write_bytes(header.tobytes() + fields.tobytes() + bytes(5000))
    with pytest.raises(Mistake, match=r"its fields are a\\tb, , , ,  and 295 more; expected image") as caught:
        check_beton(path, "data.train")
    assert caught.value.lines[0].isprintable()


def test_a_picture_that_another_program_would_open_is_refused(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("another program was called"))
    (tmp_path / "a").mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    (tmp_path / "a" / "x.png").write_bytes(stream.getvalue())
    with pytest.raises(Mistake, match=r"a/x\.png: not a readable picture"):
        open_source(tmp_path).read(0)
