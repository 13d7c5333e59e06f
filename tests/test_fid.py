"""fid.py: what is counted batch by batch, read bit by bit or folded, against the whole."""

import json
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import call

import fid
from common import UserError
from experiments.machine import judging


class Cheap(nn.Module):
    """Six features, five places and four classes in Inception's place."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        x = images.float().flatten(1)
        return x[:, :6], x[:, 6:11], x[:, :4].div(255).softmax(dim=1)


@pytest.fixture
def measured(monkeypatch, capsys):
    """The figures of `fid.py FLAGS` with that network."""
    monkeypatch.setattr(fid, "load_inception", lambda weights: Cheap())

    def run(*flags):
        call(fid, *flags, "--device", "cpu")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def pictures(number, seed=0, side=8):
    return np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), dtype=np.uint8)


# ---- archives that are read batch by batch

WRITERS = {
    "numpy": lambda path, images: np.savez(path, arr_0=images),
    "compressed": lambda path, images: np.savez_compressed(path, arr_0=images),
    "ADM with labels": lambda path, images: np.savez(path, images, np.arange(len(images))),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_archive_is_what_its_images_are(kind, measured, tmp_path):
    """By formulas for the whole, whatever the batch; the last one is smaller."""
    a, b = pictures(23), pictures(19, seed=1)
    WRITERS[kind](tmp_path / "a.npz", a)
    WRITERS[kind](tmp_path / "b.npz", b)
    x, y = (images[:, 0, :6, 0].astype(float) for images in (a, b))  # channels come first
    both = (x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    want = fid.frechet_distance(*both)
    for batch in (5, 64):
        got = measured(tmp_path / "a.npz", tmp_path / "b.npz", "--batch-size", batch)
        assert (got["num"], got["reference_num"]) == (23, 19)
        assert got["FID"] == pytest.approx(want, rel=1e-6)
        precision, recall = fid.precision_recall(torch.tensor(y), torch.tensor(x))
        assert got["precision"] == pytest.approx(precision, abs=1e-6)
        assert got["recall"] == pytest.approx(recall, abs=1e-6)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_images_of_an_archive_are_never_in_memory_together(kind, tmp_path):
    """By what Python and NumPy allocate: the archive's images would be 12 MB."""
    import tracemalloc

    WRITERS[kind](tmp_path / "a.npz", pictures(4000, side=32))
    args = fid.Settings(batch_size=50)
    tracemalloc.start()
    try:
        _, batches, _ = fid.open_side(tmp_path / "a.npz", args)
        assert sum(len(images) for images in batches) == 4000
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 4000 * 32 * 32 * 3 / 2  # zipfile alone takes 3 MB


@pytest.mark.parametrize("kind", WRITERS)
def test_a_damaged_archive_is_refused_before_the_work(kind, tmp_path):
    path = tmp_path / "a.npz"
    WRITERS[kind](path, pictures(40))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("arr_0.npy")
    content[info.header_offset + info.compress_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.npz"):
        fid.open_side(path, fid.Settings())


def test_images_that_lie_by_columns_are_refused_by_that_name(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.asfortranarray(pictures(3)))
    with pytest.raises(UserError, match="by columns"):
        fid.open_side(tmp_path / "a.npz", fid.Settings())


# ---- Inception


@pytest.mark.slow
def test_folded_batch_norms_are_the_same_function(tmp_path):
    """Against the network as it is saved, its norms computed one by one, all pooled as in 2015."""
    torch.manual_seed(0)
    network = fid.InceptionV3()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias.data):
                tensor.normal_(0, 0.1)
            for tensor in (layer.running_var, layer.weight.data):
                tensor.uniform_(0.8, 1.2)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    folded = fid.load_inception(tmp_path / "weights.pth")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    images = torch.from_numpy(pictures(1, side=24)).permute(0, 3, 1, 2)
    with torch.no_grad():
        ours = folded.to(memory_format=torch.channels_last)(images)
        theirs = network(images)
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()


def test_averages_do_not_count_what_lies_outside():
    """Of torchvision's pooled map, made FID's: against the mean of the neighbours that exist."""
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    pooled = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    got = fid.without_padding(None, (pooled,))
    for row in range(5):
        for column in range(4):
            near = x[:, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert torch.allclose(got[:, :, row, column], near.mean(dim=(2, 3)))


# ---- precision and recall


def test_precision_and_recall_over_many_blocks():
    """2,100 points, more than a block: against all distances at once, in float64."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2100, 4, generator=generator, dtype=torch.float64)
    fake = 0.8 * torch.randn(2070, 4, generator=generator, dtype=torch.float64) + 0.3

    def radii(points):
        return (points[:, None] - points).norm(dim=2).sort(dim=1)[0][:, 3]

    between = (fake[:, None] - real).norm(dim=2)
    precision = (between <= radii(real)).any(dim=1).double().mean().item()
    recall = (between <= radii(fake)[:, None]).any(dim=0).double().mean().item()
    assert fid.precision_recall(real, fake) == (precision, recall)
    assert 0.5 < recall < precision < 0.999
    assert judging.plain_precision_recall(real, fake) == (precision, recall)
