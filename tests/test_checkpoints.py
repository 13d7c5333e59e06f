"""Checkpoints and latents from elsewhere and for elsewhere: SiT's own, export.py, REPA's data; a
teacher from an average alone; the curve of a run."""

import argparse
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import ROOT, build, call, tiny, write_checkpoint

import build_teacher
import fid
from common import UserError
from experiments.checkpoints import convert_sit, curve, export
from experiments.latents import convert_repa_data
from models import load_checkpoint
from vae_latents import AutoencoderKL, LatentFolder, load_vae

CLASSES = 5
SAID = ["--classes", CLASSES, "--path", "linear", "--prediction", "v"]


def refused(module, *flags, says):
    """The one line that a script says of a mistake."""
    with pytest.raises((UserError, OSError)) as caught:
        call(module, *flags)
    text = str(caught.value)
    assert "\n" not in text and all(str(word) in text for word in says), text
    return text


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL((8, 16), layers=1)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    torch.save({"model": vae.state_dict(), "scale": 1.0}, path)
    return path


def random_weights(qk_norm, seed=0):
    """A tiny network of ours whose every tensor matters."""
    torch.manual_seed(seed)
    model = build("SiT-N/8", 16, 4, CLASSES, qk_norm)
    for name, p in model.named_parameters():
        if p.abs().sum() == 0 or name.endswith("norm.weight"):
            torch.nn.init.normal_(p, mean=p.detach().mean().item(), std=0.05)
        if "_embedder" in name:  # times and labels that matter
            torch.nn.init.normal_(p, std=0.15)
    return model


@pytest.fixture(scope="module")
def plain():
    return random_weights(qk_norm=False)


# ---- SiT's own checkpoints


def sit_state(seed=1):
    """A state dict of SiT's network: names, shapes, twice the channels in the last layer."""
    state = random_weights(qk_norm=False, seed=seed).state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = 0.1 * torch.randn(2 * len(state[key]), *state[key].shape[1:])
    return state


def sit_velocity(state, x, t, y, heads, channels=4):
    """SiT's network (willisma/SiT, models.py at a87098c) from its description, in float64: t = 1 is
    data, the result is data - noise, the variance is dropped."""
    w = {key: value.double() for key, value in state.items()}
    linear = lambda name, h: F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    norm = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)  # noqa: E731
    patch, width = w["x_embedder.proj.weight"].shape[-1], w["pos_embed"].shape[-1]
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    freqs = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = t[:, None] * freqs
    c = F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1)))
    c = F.silu(linear("t_embedder.mlp.2", c) + w["y_embedder.embedding_table.weight"][y])
    for block in range(sum(key.endswith("attn.qkv.weight") for key in w)):
        at = f"blocks.{block}"
        parts = linear(f"{at}.adaLN_modulation.1", c)[:, None].chunk(6, dim=2)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        qkv = linear(f"{at}.attn.qkv", norm(h) * (1 + scale) + shift)
        q, k, v = qkv.unflatten(2, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=3) @ v
        h = h + gate * linear(f"{at}.attn.proj", mixed.transpose(1, 2).flatten(2))
        inner = linear(f"{at}.mlp.fc1", norm(h) * (1 + scale_mlp) + shift_mlp)
        h = h + gate_mlp * linear(f"{at}.mlp.fc2", F.gelu(inner, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=2)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    side = math.isqrt(h.shape[1])
    cells = h.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
    image = torch.einsum("nhwpqc->nchpwq", cells).flatten(4, 5).flatten(2, 3)
    return image[:, :channels]


def largest_difference(state, ours):
    """Between SiT's network and ours with time and sign turned, over times and all labels."""
    heads = ours.blocks[0].attn.heads
    y = torch.arange(CLASSES + 1)
    t = torch.tensor([0.0, 0.1, 0.37, 0.5, 0.93, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(y), 4, 16, 16, generator=generator, dtype=torch.float64)
    theirs = sit_velocity(state, x, t, y, heads)
    with torch.no_grad():
        here, _ = ours.double()(x, 1 - t, y)
        untold, _ = ours(x, t, y)
    assert theirs.std() > 0.3 and (here - untold).std() > 0.01  # the time matters
    return (here + theirs).abs().max().item()


@pytest.mark.parametrize("kind", ["whole", "weights alone", "safetensors", "half"])
def test_sits_own_velocity_at_t_is_ours_at_1_minus_t_with_the_other_sign(kind, vae_file, tmp_path):
    state, source, flags = sit_state(), tmp_path / "0400000.pt", []
    if kind == "half":
        state = {key: value.half() for key, value in state.items()}
    if kind == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        source = source.with_suffix(".safetensors")
        safetensors.save_file(state, source)
    elif kind == "whole":  # as its train.py writes it
        says = {"path_type": "Linear", "prediction": "velocity", "num_classes": CLASSES}
        raw = {key: value + 1 for key, value in state.items()}
        torch.save({"model": raw, "ema": state, "args": argparse.Namespace(**says)}, source)
    else:
        torch.save(state, source)
    if kind != "whole":
        flags = [*SAID, "--from", "sit"]
    call(convert_sit, source, tmp_path / "out.pt", "--vae", vae_file, *flags)
    ours, saved = load_checkpoint(tmp_path / "out.pt")
    difference = largest_difference(state, ours)
    print(f"{kind}: {difference:.1e}")
    assert difference < 1e-6
    assert saved["args"]["label_drop"] == 0.1 and not saved["args"]["qk_norm"]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_exported_weights_have_repas_names_and_come_back_as_they_were(
    qk_norm, ending, vae_file, tmp_path
):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    model = random_weights(qk_norm)
    source = write_checkpoint(tmp_path / "ckpt-0000007.pt", model, "SiT-N/8", shift=1.0)
    out, back = tmp_path / f"new/sit.{ending}", tmp_path / "back.pt"
    call(export, source, out)
    state = convert_sit.read(out)
    state = state["ema"] if ending == "pt" else state["state_dict"]
    names = ["pos_embed", *(f"x_embedder.proj.{kind}" for kind in ("weight", "bias"))]
    names += [f"t_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    names += ["y_embedder.embedding_table.weight"]
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers += ["attn.q_norm", "attn.k_norm"] if qk_norm else []
    for layer in [f"blocks.{i}.{layer}" for i in range(6) for layer in layers]:
        names += [f"{layer}.weight", f"{layer}.bias"]
    for layer in ("linear", "adaLN_modulation.1"):
        names += [f"final_layer.{layer}.weight", f"final_layer.{layer}.bias"]
    assert sorted(state) == sorted(names)
    assert same(state, dict(model.state_dict()))  # the average, not the raw weights
    assert {value.dtype for value in state.values()} == {torch.float32}
    call(convert_sit, out, back, "--vae", vae_file)  # it says the rest itself
    ours, saved = load_checkpoint(back)
    assert same(ours.state_dict(), model.state_dict())
    assert saved["meta"]["classes"] == [f"class {i}" for i in range(CLASSES)]
    run = saved["args"]
    assert (saved["step"], run["label_drop"], run["qk_norm"]) == (7, 0.1, qk_norm)
    text = refused(export, source, out, says=[out, "exists already"])
    assert "choose another" in text and same(
        convert_sit.find_weights(convert_sit.read(out), {})["ema"], dict(model.state_dict())
    )


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_exported_for_sit_it_is_sits_network_and_comes_back_as_it_was(
    ending, plain, vae_file, tmp_path
):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    source = write_checkpoint(tmp_path / "ckpt-0000007.pt", plain, "SiT-N/8", shift=1.0)
    out, back = tmp_path / f"sit.{ending}", tmp_path / "back.pt"
    call(export, source, out, "--for", "sit")
    state = convert_sit.read(out)
    state = state["ema"] if ending == "pt" else state["state_dict"]
    assert len(state["final_layer.linear.bias"]) == 2 * 8 * 8 * 4
    cells = state["final_layer.linear.weight"].unflatten(0, (64, 8))
    assert not cells[:, 4:].any() and cells[:, :4].any()
    difference = largest_difference(state, load_checkpoint(source)[0])
    print(f"for sit: {difference:.1e}")
    assert difference < 1e-6
    call(convert_sit, out, back, "--vae", vae_file)  # its own words say that it is SiT's
    assert same(load_checkpoint(back)[0].state_dict(), plain.state_dict())


def test_sits_own_come_back_from_here_as_they_were(vae_file, tmp_path):
    state = sit_state()
    torch.save(state, tmp_path / "theirs.pt")
    flags = ["--vae", vae_file, "--from", "sit", *SAID]
    call(convert_sit, tmp_path / "theirs.pt", tmp_path / "ours.pt", *flags)
    call(export, tmp_path / "ours.pt", tmp_path / "again.pt", "--for", "sit")
    again = torch.load(tmp_path / "again.pt", weights_only=True)["ema"]
    for key, value in state.items():
        if key.startswith("final_layer.linear"):  # its variance half is not kept
            value, again[key] = (x.unflatten(0, (64, 8))[:, :4] for x in (value, again[key]))
        assert again[key].dtype == torch.float32 and torch.equal(again[key], value), key


def test_raw_weights_are_exported_on_demand_and_come_back_as_raw_ones(plain, vae_file, tmp_path):
    source = write_checkpoint(tmp_path / "ckpt-0000007.pt", plain, "SiT-N/8", shift=1.0)
    call(export, source, tmp_path / "raw.pt", "--weights", "model")
    exported = torch.load(tmp_path / "raw.pt", weights_only=True)["ema"]
    assert torch.equal(exported["pos_embed"], plain.pos_embed + 1)
    call(convert_sit, tmp_path / "raw.pt", tmp_path / "back.pt", "--vae", vae_file)
    saved = torch.load(tmp_path / "back.pt", weights_only=True)
    assert same(saved["model"], exported) and "ema" not in saved


def test_what_cannot_be_exported_is_refused(plain, vae_file, tmp_path, monkeypatch):
    normed = write_checkpoint(tmp_path / "normed.pt", random_weights(True), "SiT-N/8")
    refused(export, normed, tmp_path / "o.pt", "--for", "sit", says=[normed, "q and k", "--for"])
    refused(export, normed, tmp_path / "o.bin", says=["o.bin", ".safetensors or .pt"])
    early = write_checkpoint(tmp_path / "early.pt", plain, "SiT-N/8", step=1)
    saved = torch.load(early, weights_only=True)
    torch.save({**saved, "args": {**saved["args"], "ema_ramp": False}}, early)
    refused(export, early, tmp_path / "o.pt", says=[early, "untrained", "--weights model"])
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    missing = ["o.safetensors", "pip install safetensors"]
    refused(export, normed, tmp_path / "o.safetensors", says=missing)
    assert not list(tmp_path.glob("o.*"))
    (tmp_path / "theirs.safetensors").write_text("weights")
    flags = [tmp_path / "theirs.safetensors", tmp_path / "o.pt", "--vae", vae_file, *SAID]
    refused(convert_sit, *flags, says=["theirs.safetensors", "pip install safetensors"])


def test_a_wrong_guess_is_refused_where_it_can_be_told(plain, vae_file, tmp_path):
    out = tmp_path / "out.pt"

    def told(state, *flags, says, words=None):
        torch.save({"ema": state, "args": words or {}}, tmp_path / "theirs.pt")
        flags = [*flags, *([] if words else SAID[2:]), "--classes", CLASSES, "--vae", vae_file]
        refused(convert_sit, tmp_path / "theirs.pt", out, *flags, says=["theirs.pt", *says])
        assert not out.exists()

    repa = {"path_type": "linear", "prediction": "v"}
    sit = {"path_type": "Linear", "prediction": "velocity"}
    state, normed = plain.state_dict(), random_weights(True).state_dict()
    told(state, "--from", "sit", says=["linear and v", "--from sit"], words=repa)
    told(state, "--from", "sit", says=["no variance", "leave out"])
    told(normed, "--from", "sit", says=["normalises q and k", "leave out"])
    told(normed, says=["Linear and velocity", "normalises q and k"], words=sit)
    told(sit_state(), "--from", "repa", says=["Linear and velocity", "--from repa"], words=sit)
    told(sit_state(), says=["learn_sigma", "--from sit", "DiT"])
    told(sit_state(), says=["Linear and v", "one project"], words={**sit, "prediction": "v"})
    told(sit_state(), says=["path is GVP"], words={**sit, "path_type": "GVP"})
    told(sit_state(), says=["prediction score"], words={**sit, "prediction": "score"})
    told(sit_state(), says=["scale 2", "1"], words={**sit, "scale": 2.0})
    torch.save({"ema": sit_state()}, tmp_path / "bare.pt")
    flags = [out, "--vae", vae_file, "--from", "sit", "--classes", CLASSES]
    refused(convert_sit, tmp_path / "bare.pt", *flags, says=["bare.pt", "--path"])


# ---- a teacher from an average alone


def test_an_average_alone_teaches_and_a_line_says_so(plain, vae_file, tmp_path, capsys):
    torch.save(plain.state_dict(), tmp_path / "last.pt")  # as REPA's last.pt
    call(convert_sit, tmp_path / "last.pt", tmp_path / "ours.pt", "--vae", vae_file, *SAID)
    call(build_teacher, "--ckpt", tmp_path / "ours.pt", "--out", tmp_path / "teacher")
    said = capsys.readouterr().out
    assert "ours.pt: holds an average alone, which teaches" in said
    teacher, _ = build_teacher.load_teacher(tmp_path / "teacher/teacher.pt")
    assert torch.equal(teacher.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    both = write_checkpoint(tmp_path / "both.pt", plain, "SiT-N/8", shift=1.0)
    call(build_teacher, "--ckpt", both, "--out", tmp_path / "raw")  # raw weights come first
    teacher, _ = build_teacher.load_teacher(tmp_path / "raw/teacher.pt")
    assert torch.equal(teacher.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight + 1)
    assert "holds an average" not in capsys.readouterr().out


def snapshot(path, model, step, **changes):
    """A snapshot as training writes it: the average alone, no optimizer."""
    saved = torch.load(write_checkpoint(path, model, "SiT-N/8", step), weights_only=True)
    args = {**saved["args"], **changes}
    kept = {key: saved[key] for key in ("format", "step", "meta", "ema")}
    torch.save({**kept, "args": args}, path)
    return path


def test_the_remedies_of_a_snapshot_are_not_flags_that_lead_nowhere(plain, tmp_path):
    early = snapshot(tmp_path / "snapshot-0000001.pt", plain, 1, ema_ramp=False)
    text = refused(build_teacher, "--ckpt", early, "--out", tmp_path, says=["a later checkpoint"])
    assert "--weights" not in text


# ---- REPA's data


def repa_data(folder, num=20, classes=3, channels=4, side=8, nested=True):
    """vae-sd as REPA's preprocessing/dataset_tools.py writes it (at 2b8c181), and its arrays."""
    rng = np.random.default_rng(0)
    features = folder / "vae-sd" if nested else folder
    labels, arrays = [], []
    for i in range(num):
        mean = rng.normal(size=(channels, side, side))
        std = rng.uniform(0.05, 0.2, size=mean.shape)
        arrays.append(np.concatenate([mean, std]).astype(np.float32))
        name = f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy"
        (features / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(features / name, arrays[-1])
        labels.append([name, i * 7 % classes])
    (features / "dataset.json").write_text(json.dumps({"labels": labels}))
    return np.stack(arrays), [label for _, label in labels]


@pytest.mark.parametrize("nested", [True, False])
def test_repas_data_becomes_latents_with_the_same_mean_and_std(nested, vae_file, tmp_path, capsys):
    arrays, labels = repa_data(tmp_path / "theirs", nested=nested)
    given = [tmp_path / "theirs", "--vae", vae_file, "--out", tmp_path / "ours", "--batch-size", 7]
    call(convert_repa_data, *given)
    folder = LatentFolder(tmp_path / "ours")
    assert np.array_equal(folder.moments, arrays.astype(np.float16))
    assert folder.labels.tolist() == labels
    meta, vae = folder.meta, load_vae(vae_file)
    assert meta["classes"] == ["0", "1", "2"] and meta["scale"] == vae.scale
    assert meta["vae"] == {"path": str(vae_file), "identity": vae.identity()}
    assert meta["image_size"] == 16
    std = np.sqrt(arrays[:, :4].var() + (arrays[:, 4:] ** 2).mean())
    assert meta["std"] == pytest.approx(vae.scale * std, rel=1e-3)
    assert json.loads((tmp_path / "ours/files.json").read_text())[3].endswith("00000003.npy")
    assert not list((tmp_path / "ours").glob("*.part.npy"))
    capsys.readouterr()
    call(convert_repa_data, *given)
    assert "complete already" in capsys.readouterr().out
    np.save(next((tmp_path / "theirs").rglob("*-00000000.npy")), arrays[1])  # another data set
    refused(convert_repa_data, *given, says=["ours", "other latents"])


def test_repas_data_in_its_own_order_with_names(vae_file, tmp_path):
    """dataset.json may list them in any order; REPA pairs them by name, and sorts."""
    arrays, labels = repa_data(tmp_path / "theirs")
    path = tmp_path / "theirs/vae-sd/dataset.json"
    listed = json.loads(path.read_text())["labels"]
    path.write_text(json.dumps({"labels": listed[::-1]}))
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nshark\n")
    given = [tmp_path / "theirs", "--vae", vae_file, "--out", tmp_path / "ours"]
    call(convert_repa_data, *given, "--class-names", tmp_path / "names.txt")
    folder = LatentFolder(tmp_path / "ours")
    assert folder.labels.tolist() == labels
    assert np.array_equal(folder.moments, arrays.astype(np.float16))
    assert folder.meta["classes"] == ["tench", "goldfish", "shark"]
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    flags = [*given[:-1], tmp_path / "o", "--class-names", tmp_path / "names.txt"]
    refused(convert_repa_data, *flags, says=["names.txt", "3 classes"])


def test_repas_data_goes_on_after_a_kill(vae_file, tmp_path, monkeypatch):
    arrays, _ = repa_data(tmp_path / "theirs")
    given = [tmp_path / "theirs", "--vae", vae_file, "--out", tmp_path / "ours", "--batch-size", 4]
    read, seen = convert_repa_data.Encoded.read, []

    def read_until(limit):
        def some(self, name):
            seen.append(name)
            if len(seen) > limit:
                raise KeyboardInterrupt
            return read(self, name)

        return some

    monkeypatch.setattr(convert_repa_data.Encoded, "read", read_until(11))
    with pytest.raises(KeyboardInterrupt):
        call(convert_repa_data, *given)
    assert not (tmp_path / "ours/meta.json").exists()
    refused(convert_repa_data, *given[:2], tmp_path / "none.pt", *given[3:], says=["none.pt"])
    (tmp_path / "names.txt").write_text("a\nb\nc\n")  # other classes are other latents
    names = ["--class-names", tmp_path / "names.txt"]
    monkeypatch.setattr(convert_repa_data.Encoded, "read", read_until(10**9))
    refused(convert_repa_data, *given, *names, says=["ours", "other latents"])
    seen.clear()
    call(convert_repa_data, *given)
    assert len(seen) < 20  # the first chunks are not read again
    assert np.array_equal(LatentFolder(tmp_path / "ours").moments, arrays.astype(np.float16))


@pytest.mark.parametrize("kind", ["none", "null", "vectors", "twice", "absent"])
def test_labels_of_repas_data_that_are_none_are_refused(kind, vae_file, tmp_path):
    repa_data(tmp_path / "theirs")
    path = tmp_path / "theirs/vae-sd/dataset.json"
    labels = json.loads(path.read_text())["labels"]
    changed = {
        "null": None,
        "vectors": [[name, [0.0, 1.0]] for name, _ in labels],
        "twice": [*labels, [labels[0][0], 2]],
        "absent": [*labels, ["00000/img-mean-std-00000099.npy", 1]],
    }
    path.write_text(json.dumps({"labels": changed[kind]})) if kind in changed else path.unlink()
    given = [tmp_path / "theirs", "--vae", vae_file, "--out", tmp_path / "ours"]
    says = ["00000099.npy"] if kind == "absent" else ["dataset.json"]
    refused(convert_repa_data, *given, says=says)
    assert not (tmp_path / "ours/meta.json").exists()


@pytest.mark.parametrize("kind", ["cut", "shape", "nan", "large", "logvar", "channels"])
def test_damaged_arrays_of_repas_data_are_named(kind, vae_file, tmp_path):
    arrays, _ = repa_data(tmp_path / "theirs", channels=8 if kind == "channels" else 4)
    path = tmp_path / "theirs/vae-sd/00000/img-mean-std-00000005.npy"
    changed = {
        "shape": arrays[5][:, :4],
        "nan": arrays[5] * np.nan,
        "large": arrays[5] * 1e6,
        "logvar": -arrays[5],
    }
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif kind in changed:
        np.save(path, changed[kind])
    says = ["00000000.npy", "4 channels"] if kind == "channels" else ["00000005.npy"]
    given = [tmp_path / "theirs", "--vae", vae_file, "--out", tmp_path / "ours"]
    refused(convert_repa_data, *given, says=says)
    assert not (tmp_path / "ours/meta.json").exists()


# ---- the curve of a run


@pytest.fixture
def scripts(monkeypatch):
    """What curve.py runs: sample.py's work is a file, fid.py's a number that the step decides."""
    ran = []

    def script(name, *flags, processes=1):
        ran.append((name, [str(flag) for flag in flags]))
        if name == "sample.py":
            folder = flags[flags.index("--out") + 1]
            folder.mkdir(parents=True)
            (folder / "samples.npz").write_text("large")
            return "samples.npz: done"
        assert (flags[0] / "samples.npz").exists()
        step = int(flags[0].name[:7])
        return json.dumps({"IS": 1.5, "FID": 1000 / step, "sampled": {"cfg": 1.0}})

    monkeypatch.setattr(curve, "script", script)
    return ran


def checkpoints_in(ran):
    return [flags[flags.index("--ckpt") + 1].rpartition("/")[2] for _, flags in ran[::2]]


def test_a_curve_has_every_snapshot_once_and_goes_on(plain, scripts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run, reference = tmp_path / "run", tmp_path / "ref.npz"
    reference.write_text("statistics")
    snapshot(run / "snapshot-0000020.pt", plain, 20)
    snapshot(run / "snapshot-0000010.pt", plain, 10)
    snapshot(run / "snapshot-0000001.pt", plain, 1, ema_ramp=False)  # an untrained average
    write_checkpoint(run / "ckpt-0000020.pt", plain, "SiT-N/8", 20, shift=1.0)
    write_checkpoint(run / "ckpt-0000025.pt", plain, "SiT-N/8", 25, shift=1.0)
    (run / "ckpt-0000030.pt.tmp").write_text("cut")
    (run / "mine.pt").write_text("the user's")
    given = [run, reference, "--num-images", 8, "--cfg", 2, "--device", "cpu"]
    call(curve, *given)
    lines = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    assert [(line["step"], line["FID"]) for line in lines] == [(10, 100), (20, 50), (25, 40)]
    assert [line["file"] for line in lines][1] == "snapshot-0000020.pt"
    assert checkpoints_in(scripts) == [line["file"] for line in lines]
    _, flags = scripts[0]
    assert (
        flags[flags.index("--num-images") + 1] == "8" and flags[flags.index("--cfg") + 1] == "2.0"
    )
    assert "--classes" not in flags and "--weights" not in flags
    assert not list(run.rglob("samples.npz")) and (run / "mine.pt").exists()
    assert (run / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "snapshot-0000001.pt: its average is" in capsys.readouterr().err
    scripts.clear()
    snapshot(run / "snapshot-0000040.pt", plain, 40)
    (run / "ckpt-0000020.pt").unlink()  # as --keep does
    call(curve, *given)
    assert checkpoints_in(scripts) == ["snapshot-0000040.pt"]
    assert len((run / "curve.jsonl").read_text().splitlines()) == 4


def test_a_killed_measurement_comes_again_and_no_line_is_lost(
    plain, scripts, tmp_path, monkeypatch
):
    run, reference = tmp_path / "run", tmp_path / "ref.npz"
    reference.write_text("statistics")
    for step in (10, 20):
        snapshot(run / f"snapshot-{step:07d}.pt", plain, step)
    works = curve.script

    def killed(name, *flags, processes=1):
        if name == "fid.py" and flags[0].name.startswith("0000020"):
            raise KeyboardInterrupt
        return works(name, *flags, processes=processes)

    monkeypatch.setattr(curve, "script", killed)
    with pytest.raises(KeyboardInterrupt):
        call(curve, run, reference)
    left = list((run / "curve").glob("0000020-*"))
    assert len(left) == 1  # with what sample.py goes on with
    shutil.rmtree(left[0])  # (this sample.py starts anew)
    scripts.clear()
    monkeypatch.setattr(curve, "script", works)
    call(curve, run, reference)
    assert checkpoints_in(scripts) == ["snapshot-0000020.pt"]
    assert not list((run / "curve").glob("0*"))


def test_curves_of_several_runs_are_drawn_if_their_settings_are_the_same(plain, scripts, tmp_path):
    pytest.importorskip("matplotlib")
    reference = tmp_path / "ref.npz"
    reference.write_text("statistics")
    for run in ("a", "b"):
        snapshot(tmp_path / run / "snapshot-0000010.pt", plain, 10)
    call(curve, tmp_path / "a", reference, "--steps", 5)
    both = [tmp_path / "b", reference, "--beside", tmp_path / "a", "--out", tmp_path / "x.png"]
    says = [tmp_path / "a", "no curve of these settings"]
    refused(curve, *both, "--steps", 6, says=says)
    assert not (tmp_path / "x.png").exists()
    drawn, draw = [], curve.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve, "draw", lambda *args: drawn.append(args) or draw(*args))
        call(curve, *both, "--steps", 5)
    (curves, metric), *_ = drawn
    assert list(curves) == [str(tmp_path / "b"), str(tmp_path / "a")] and metric == "FID"
    assert all([line["FID"] for line in lines] == [100] for lines in curves.values())
    assert (tmp_path / "x.png").exists()
    steps = [line["recipe"]["steps"] for line in curve.read_lines(tmp_path / "b")]
    assert steps == [6, 5]  # lines of other settings stay
    refused(curve, *both, "--steps", 5, "--metric", "sFID", says=["no sFID", "--metric"])


def test_a_curve_of_nothing_or_of_replaced_weights_is_refused(plain, scripts, tmp_path):
    run, reference = tmp_path / "run", tmp_path / "ref.npz"
    refused(curve, run, reference, says=[run, "no folder"])
    run.mkdir()
    refused(curve, run, reference, says=[reference, "is not there"])
    reference.write_text("statistics")
    refused(curve, run, reference, says=[run, "no snapshot"])
    refused(curve, run, reference, "--out", "x.jpeg2000", says=["x.jpeg2000", ".png"])
    path = snapshot(run / "snapshot-0000010.pt", plain, 10)
    call(curve, run, reference)
    snapshot(path, random_weights(False, seed=9), 10)
    refused(curve, run, reference, says=["curve.jsonl", "step 10", "other weights"])


@pytest.mark.slow
def test_a_real_curve_of_samples(tmp_path, vae_file):
    """sample.py and fid.py as they are, with random Inception weights."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = tiny(num_classes=2, patch=8, size=8)
    saved = torch.load(write_checkpoint(tmp_path / "run/x.pt", model), weights_only=True)
    (tmp_path / "run/x.pt").unlink()
    meta = {**saved["meta"], "vae": {"path": str(vae_file), "identity": None}}
    kept = {"format": 2, "step": 10, "args": saved["args"], "meta": meta, "ema": saved["ema"]}
    torch.save(kept, tmp_path / "run/snapshot-0000010.pt")
    images = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "ref.npz", arr_0=images)
    torch.save(fid.InceptionV3().state_dict(), tmp_path / "inception.pt")
    sampler = "--num-images 4 --mode euler --steps 1 --device cpu".split()
    given = [tmp_path / "run", tmp_path / "ref.npz", "--inception", tmp_path / "inception.pt"]
    call(curve, *given, *sampler)
    (line,) = curve.read_lines(tmp_path / "run")
    assert {"FID", "sFID", "IS", "precision", "recall"} <= line.keys()
    assert line["num"] == 4 and line["sampled"]["mode"] == "euler"
    assert (tmp_path / "run/curve.png").exists() and not list(tmp_path.rglob("samples.npz"))
    (tmp_path / "run/curve.jsonl").unlink()
    refused(curve, *given, *sampler, "--classes", "no such", says=["sample.py: failed"])


# ---- pytorch-fid and clean-fid ask SciPy's sqrtm for `disp`, which 1.18 takes away


def test_frechet_distance_equals_pytorch_fids():
    module = pytest.importorskip("pytorch_fid.fid_score")
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(200, 24)) @ rng.normal(size=(24, 24)) for _ in range(2)]
    both = [moment for x in sets for moment in (x.mean(axis=0), np.cov(x, rowvar=False))]
    try:
        want = module.calculate_frechet_distance(*both)
    except TypeError as error:
        if "disp" not in str(error):
            raise
        pytest.skip(f"pytorch-fid does not run with SciPy {scipy.__version__}: {error}")
    assert fid.frechet_distance(*both) == pytest.approx(want, rel=1e-6)


# ---- docs/elsewhere.md

PAGE = (ROOT / "docs/elsewhere.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", PAGE, re.S)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_what_the_page_says_of_elsewhere_is_seen(number, capsys):
    """Where the versions that it names are installed: of others it says nothing."""
    code, printed = SNIPPETS[number]
    first = re.match(r"(?:import|from) ([\w, ]+?)(?: import|\.|\n)", code)[1]
    for name in first.split(", "):
        module = pytest.importorskip(name)
        named = re.search(rf"{module.__name__} (\d+\.\d+\.\d+)", PAGE, re.I)
        if named and module.__version__ != named[1]:
            pytest.skip(f"{module.__name__} is {module.__version__}, the page is of {named[1]}")
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_the_page_has_a_snippet_of_each_claim():
    assert len(SNIPPETS) == 6
