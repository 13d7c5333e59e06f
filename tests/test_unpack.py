"""unpack.py: tables, archives and arrays become image folders, picture for picture."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from conftest import call
from PIL import Image

from common import UserError
from experiments.latents import unpack
from vae_latents import Images


def pictures(number=6, side=8):
    return np.random.default_rng(0).integers(256, size=(number, side, side, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def by_class(folder):
    """{class: its pictures (N, S, S, 3), in the order of their names}, as vae_latents.py sees."""
    images = Images(folder, 8)
    found = {name: [] for name in images.classes}
    for i, label in enumerate(images.labels):
        found[images.classes[label]].append(images[i][0])
    return {name: np.stack(some) for name, some in found.items()}


def same(found, pixels, names):
    assert sorted(found) == sorted(set(names))
    for name in found:
        assert np.array_equal(found[name], pixels[[n == name for n in names]])


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_webdataset_shard(tmp_path):
    """Keys in folders, other files beside; two shards in a folder."""
    pixels, names = pictures(), ["b", "a", "b", "a", "a", "b"]
    (tmp_path / "shards").mkdir()
    for shard in (0, 1):
        files = []
        for i in range(3 * shard, 3 * shard + 3):
            key = f"some.folder/{i:04d}"  # a dot in a folder's name ends no key
            files += [(f"{key}.json", b"{}"), (f"{key}.png", encoded(pixels[i]))]
            files += [(f"{key}.cls", names[i].encode())]
        write_tar(tmp_path / f"shards/{shard}.tar", files)
    call(unpack, tmp_path / "shards", tmp_path / "images")
    same(by_class(tmp_path / "images"), pixels, names)


def test_encoded_images_keep_their_bytes(tmp_path):
    data = encoded(pictures()[0], "JPEG")
    write_tar(tmp_path / "a.tar", [("0.jpg", data), ("0.cls", b"3")])
    call(unpack, tmp_path / "a.tar", tmp_path / "images")
    assert (tmp_path / "images/3/0000000.jpg").read_bytes() == data


def test_a_shard_without_classes_is_refused_by_what_it_has(tmp_path):
    """As img2dataset writes them: captions and no labels."""
    files = [("0.jpg", encoded(pictures()[0], "JPEG")), ("0.txt", b"a dog"), ("0.json", b"{}")]
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError, match=r"has no .cls \(but .json, .txt\)"):
        call(unpack, tmp_path / "a.tar", tmp_path / "images")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("columns", [True, False])
def test_medmnists_arrays(columns, tmp_path):
    """Grey or in colour; labels are a column there."""
    pixels, labels = pictures(), np.array([1, 0, 1, 2, 2, 0])
    given = labels[:, None] if columns else labels
    arrays = {"train_images": pixels[..., 0], "train_labels": given, "val_images": pixels}
    np.savez(tmp_path / "a.npz", **arrays, val_labels=given)
    call(unpack, tmp_path / "a.npz", tmp_path / "grey")
    same(by_class(tmp_path / "grey"), pixels[..., :1].repeat(3, axis=3), [*map(str, labels)])
    call(unpack, tmp_path / "a.npz", tmp_path / "colours", "--split", "val")
    same(by_class(tmp_path / "colours"), pixels, [*map(str, labels)])
    with pytest.raises(UserError, match="give --split of train_images, "):
        call(unpack, tmp_path / "a.npz", tmp_path / "none", "--split", "test")


def test_several_labels_for_a_picture_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=pictures(), train_labels=np.zeros((6, 14), int))
    with pytest.raises(UserError, match="one label for each"):
        call(unpack, tmp_path / "a.npz", tmp_path / "images")


def test_cifar10_as_torchvision_lays_it_out(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, labels = pictures(10, 32), [3, 0, 3, 1, 1, 9, 9, 9, 0, 3]
    for i in range(5):  # rows of all red, then all green, then all blue values
        rows = pixels[2 * i : 2 * i + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        content = {"data": rows, "labels": labels[2 * i : 2 * i + 2]}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(content))
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    call(unpack, tmp_path, tmp_path / "images")
    images = Images(tmp_path / "images", 32)
    assert images.classes == ["class0", "class1", "class3", "class9"]
    for i, name in enumerate(images.names):
        row = int(name[-11:-4])
        assert np.array_equal(images[i][0], pixels[row])
        assert name.startswith(names[labels[row]])


@pytest.mark.parametrize("named", [True, False])
def test_a_parquet_table(named, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pixels, labels = pictures(), [1, 0, 1, 1, 0, 0]
    images = [{"bytes": encoded(x), "path": None} for x in pixels]
    table = pyarrow.table({"picture": images, "label": labels})
    names = ["0", "1"]
    if named:
        import json

        names = ["cat", "dog"]
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="give --image and --label of picture, label"):
        call(unpack, tmp_path / "a.parquet", tmp_path / "images")
    call(unpack, tmp_path / "a.parquet", tmp_path / "images", "--image", "picture")
    same(by_class(tmp_path / "images"), pixels, [names[label] for label in labels])


@pytest.mark.parametrize("name", ["..", "a/b", ""])
def test_a_class_that_is_no_folder_is_refused(name, tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", encoded(pictures()[0])), ("0.cls", name.encode())])
    with pytest.raises(UserError, match="cannot name a folder"):
        call(unpack, tmp_path / "a.tar", tmp_path / "images")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.tar", "images.part"}


def test_nothing_is_overwritten_and_nothing_is_taken_for_data(tmp_path):
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "a.npz", train_images=pictures(), train_labels=np.arange(6))
    with pytest.raises(UserError, match="exists already"):
        call(unpack, tmp_path / "a.npz", tmp_path / "images")
    with pytest.raises(UserError, match="holds no .parquet, .tar or cifar"):
        call(unpack, tmp_path / "images", tmp_path / "out")
    with pytest.raises(UserError, match="must end in"):
        (tmp_path / "a.zip").touch()
        call(unpack, tmp_path / "a.zip", tmp_path / "out")
