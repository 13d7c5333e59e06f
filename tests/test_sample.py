"""sample.py: the samplers against equations in float64, labels and names, samples.npz."""

import json
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import (
    EULER,
    NULL,
    call,
    changed_checkpoint,
    largest,
    samples_in,
    tiny,
)
from PIL import Image

import sample
from common import UserError
from vae_latents import LatentFolder

# ---- the samplers, on a Gaussian, whose velocity field is known


@pytest.mark.parametrize(
    "mode,steps,tolerance", [("euler", 200, 0.02), ("heun", 40, 0.02), ("sde", 250, 0.03)]
)
def test_samplers_on_a_gaussian(mode, steps, tolerance):
    """Data N(m, s^2): v(x, t) = E[eps - x0 | x_t = x] in closed form; samples have its m and s."""
    m, s = 1.5, 0.4

    def velocity(x, t, y):
        t = t.view(-1, 1, 1, 1)
        var = (1 - t) ** 2 * s**2 + t**2
        rest = x - (1 - t) * m
        return t / var * rest - (m + (1 - t) * s**2 / var * rest), None

    noise = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(64, dtype=torch.long)
    how = {"steps": steps, "mode": mode, "seeds": range(3, 3 + len(noise))}
    x = sample.sample(velocity, noise, y, NULL, **how)
    assert x.dtype == torch.float64
    assert abs(x.mean() - m) < tolerance and abs(x.std() - s) < tolerance


@pytest.mark.parametrize("mode", ["euler", "sde"])
def test_guidance_interval_runs_one_branch_outside(mode):
    """Inside, two calls of the batch's own size: with the labels, then with the null label."""
    calls = []

    def velocity(x, t, y):
        calls.append((round(t[0].item(), 6), len(x), len(t), y.tolist()))
        assert (t == t[0]).all()
        return -x, None

    noise, how = torch.randn(2, 1, 4, 4), {"cfg": 2.0, "interval": (0.25, 0.65)}
    sample.sample(velocity, noise, torch.tensor([3, 4]), NULL, steps=10, mode=mode, **how)
    step, wanted = {"euler": 1 / 10, "sde": (1 - 0.04) / 9}[mode], []
    for t in (1 - i * step for i in range(10)):
        wanted.append((round(t, 6), 2, 2, [3, 4]))
        if 0.25 <= t <= 0.65:
            wanted.append((round(t, 6), 2, 2, [NULL, NULL]))
    assert 10 < len(wanted) < 20 and calls == wanted


def test_guiding_the_velocity_is_guiding_the_drift():
    """Of the SDE, as the paper has it: its drift is affine in v, so the two differ by rounding."""
    model, cfg, steps = tiny(name="SiT-P").double().eval(), 2.0, 60
    y, null = torch.tensor([1, 4, 7]), torch.tensor([NULL] * 3)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()

    def drift(x, t, labels):  # v - w/2 score, with w = 2 t
        v = model(x, torch.full((3,), t, dtype=torch.float64), labels)[0]
        return v - t * (-((1 - t) * v + x) / t)

    generators = [torch.Generator().manual_seed(7 + i + 1) for i in range(3)]  # as sample() does
    times = [1 + (0.04 - 1) * i / (steps - 1) for i in range(steps)] + [0.0]
    want = noise
    with torch.no_grad():
        for t, t_next in zip(times, times[1:], strict=False):
            guided = drift(want, t, null) + cfg * (drift(want, t, y) - drift(want, t, null))
            want = want + (t_next - t) * guided
            if t_next > 0:
                fresh = [
                    torch.randn(4, 16, 16, generator=g, dtype=torch.float64) for g in generators
                ]
                want = want + math.sqrt(2 * t * (t - t_next)) * torch.stack(fresh)
    got = sample.sample(model, noise, y, NULL, steps=steps, mode="sde", cfg=cfg, seeds=[7, 8, 9])
    plain = sample.sample(model, noise, y, NULL, steps=steps, mode="sde", cfg=1.0, seeds=[7, 8, 9])
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    print(f"guided velocity against guided drift: {error:.1e} of numbers up to {size:.1f}")
    assert error < 1e-12 * size
    assert (got - plain).abs().max() > 0.01  # guidance does something here


def test_number_of_network_evaluations():
    times = []

    def velocity(x, t, y):
        times.append(t)
        return -x, None

    for mode, steps, wanted in (("euler", 12, 12), ("heun", 12, 23), ("sde", 12, 12)):
        times.clear()
        y = torch.tensor([0])
        sample.sample(velocity, torch.randn(1, 1, 4, 4), y, NULL, steps=steps, mode=mode)
        assert len(times) == wanted, mode


def test_an_images_noise_depends_on_its_index_alone():
    one, seeds = sample.initial_noise(5, range(7, 8), (2, 3, 3))
    many, more = sample.initial_noise(5, range(0, 10), (2, 3, 3))
    assert torch.equal(one[0], many[7]) and seeds[0] == more[7]
    model, y = tiny().eval(), torch.arange(6) % 3
    noise, seeds = sample.initial_noise(0, range(6), (4, 16, 16))
    how = {"steps": 4, "mode": "sde", "cfg": 2.0}
    whole = sample.sample(model, noise, y, NULL, **how, seeds=seeds)
    cuts = [slice(i, i + 2) for i in (0, 2, 4)]
    parts = [sample.sample(model, noise[c], y[c], NULL, **how, seeds=seeds[c]) for c in cuts]
    assert (whole - torch.cat(parts)).abs().max() < 1e-4


# ---- the samplers against their equations in float64


def transcription(model, x, y, null, steps, mode, cfg, interval, noises):
    """Sampling as the papers word it, one branch at a time."""

    def velocity(x, t, labels):
        return model(x, torch.full((len(x),), t, dtype=torch.float64), labels)[0]

    def guided(f, *at):
        inside = cfg != 1 and interval[0] <= at[1] <= interval[1]
        return f(*at, null) + cfg * (f(*at, y) - f(*at, null)) if inside else f(*at, y)

    def drift(x, t, labels):
        v = velocity(x, t, labels)
        return v - (2 * t) / 2 * (-((1 - t) * v + x) / t)

    if mode == "sde":
        times = [1 + (0.04 - 1) * i / (steps - 1) for i in range(steps)] + [0.0]
        for i in range(steps):
            t, dt = times[i], times[i + 1] - times[i]
            x = x + guided(drift, x, t) * dt
            if i < steps - 1:
                x = x + math.sqrt(2 * t * abs(dt)) * noises[i]
        return x
    for i in range(steps):
        t, t_next = 1 - i / steps, 1 - (i + 1) / steps
        k1 = guided(velocity, x, t)
        ahead = x + (t_next - t) * k1
        if mode == "heun" and i < steps - 1:
            k2 = guided(velocity, ahead, t_next)
            ahead = x + (t_next - t) * (k1 + k2) / 2
        x = ahead
    return x


@pytest.mark.parametrize("mode", ["euler", "heun", "sde"])
@pytest.mark.parametrize("cfg,low,high", [(1.0, 0.0, 1.0), (2.5, 0.0, 1.0), (1.9, 0.2, 0.65)])
def test_samplers_against_a_transcription(mode, cfg, low, high):
    model = tiny(name="SiT-P").double().eval()
    y, null = torch.tensor([1, 4]), torch.tensor([10, 10])
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    generators = [torch.Generator().manual_seed(7 + i + 1) for i in range(2)]  # as sample() does
    shape = {"size": (4, 16, 16), "dtype": torch.float64}
    noises = [
        torch.stack([torch.randn(**shape, generator=generator) for generator in generators])
        for _ in range(11)
    ]
    with torch.no_grad():
        want = transcription(model, noise, y, null, 12, mode, cfg, (low, high), noises)
    got = sample.sample(model, noise, y, 10, 12, mode, cfg, (low, high), range(7, 7 + len(noise)))
    print("sampler", mode, cfg, high, f"{largest(got, want):.1e}")
    assert largest(got, want) < 1e-6 and largest(got, noise) > 0.1


# ---- samples.npz, and flags


@pytest.mark.slow
def test_samples_are_what_adms_evaluator_reads(runs, tmp_path):
    flags = ["--num-images", 5, "--steps", 2, "--out", tmp_path, "--device", "cpu"]
    call(sample, "--ckpt", runs / "stage2", *flags)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (5, 32, 32, 3)
        assert file["labels"].tolist() == [0, 1, 2, 3, 4]


def test_no_checkpoint(refused, tmp_path):
    none = ["--ckpt", "not/there.pt", "--out", tmp_path / "o"]
    refused(
        "sample.py", *none, says=["not/there.pt", "No such file", "no checkpoint of this project"]
    )
    (tmp_path / "young").mkdir()  # a run before its first checkpoint
    young = ["--ckpt", tmp_path / "young", "--out", tmp_path / "o"]
    refused("sample.py", *young, says=["young/ckpt-*.pt", "No such file"])


SAMPLING = {
    "--cfg 0.5": "--cfg 0.5",
    "--cfg nan": "--cfg nan: must be a finite number",
    "--cfg inf": "--cfg inf: must be a finite number",
    "--num-images 0": "--num-images",
    "--steps 0": "--steps",
    "--classes 3,cat": "--classes cat",
    "--classes 3,": "--classes",
    "--classes -1": "--classes -1",
    "--classes 10": "labels are 0 to 7",
    "--guidance-low 0.8 --guidance-high 0.2": "--guidance-low",
    "--mode magic": "--mode",
    "--vae /nowhere.bin": "/nowhere.bin",
    "--labels some": "--labels",
}


@pytest.mark.parametrize("flags", SAMPLING)
def test_bad_sampling_flags(refused, runs, tmp_path, flags):
    ckpt = ["--ckpt", runs / "stage2", "--out", tmp_path / "o", "--device", "cpu"]
    refused("sample.py", *ckpt, *flags.split(), says=[SAMPLING[flags]])
    assert not (tmp_path / "o").exists()


def test_samples_of_others_are_left_alone(refused, runs, tmp_path):
    """A finished samples.npz of other settings, or of another program: an error, not a loss."""
    flags = ["--ckpt", runs / "stage2", "--steps", 2, "--mode", "euler", "--device", "cpu"]
    call(sample, *flags, "--num-images", 2, "--out", tmp_path / "a")
    refused("sample.py", *flags, "--num-images", 3, "--out", tmp_path / "a", says=["another --out"])
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b/samples.npz", arr_0=np.zeros(3))
    refused("sample.py", *flags, "--num-images", 2, "--out", tmp_path / "b", says=["another --out"])


def test_classes_by_name_and_a_column_for_each(runs, tmp_path, capsys):
    flags = ["--ckpt", runs / "stage2", "--steps", 2, "--mode", "euler", "--device", "cpu"]
    call(sample, *flags, "--num-images", 8, "--classes", "star,0,heart,1", "--out", tmp_path)
    out = capsys.readouterr().out
    assert "star, arrow, heart, circle" in out
    with np.load(tmp_path / "samples.npz") as file:
        assert file["labels"].tolist() == [6, 0, 4, 1] * 2
    assert Image.open(tmp_path / "grid.png").size == (4 * 96, 2 * 96)


# ---- labels


def test_without_classes_every_label_comes_in_turn(numbered, tmp_path, capsys):
    """By index: names do not come into it, whatever they look like."""
    call(sample, "--ckpt", numbered.run, "--num-images", 30, *EULER, "--out", tmp_path)
    assert samples_in(tmp_path)["labels"].tolist() == [i % 12 for i in range(30)]
    assert "0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9" in capsys.readouterr().out  # the grid's columns


NUMBERS = sorted(str(i) for i in range(12))


@pytest.mark.parametrize("word", NUMBERS)
def test_a_word_that_is_a_name_and_another_label_is_refused_with_both(word):
    label = NUMBERS.index(word)
    if int(word) != label:
        with pytest.raises(UserError) as error:
            sample.find_label(word, NUMBERS)
        for reading in (f"name:{word}", f"label:{word}", NUMBERS[int(word)], str(label)):
            assert reading in str(error.value)
    else:
        assert sample.find_label(word, NUMBERS) == label
    assert sample.find_label(f"name:{word}", NUMBERS) == label
    assert sample.find_label(f"label:{word}", NUMBERS) == int(word)


def test_the_readings_that_the_message_offers_are_taken(numbered, refused, tmp_path):
    given = ["--ckpt", numbered.run, *EULER]
    err = refused(sample, *given, "--classes", "0,10", "--out", tmp_path / "a", says=["10"])
    readings = re.findall(r"(?:name|label):10", err)
    for number, reading in enumerate(readings):
        out = ["--num-images", 2, "--classes", f"0,{reading}", "--out", tmp_path / str(number)]
        call(sample, *given, *out)
    labels = [samples_in(tmp_path / str(number))["labels"][1] for number in range(2)]
    assert dict(zip(readings, labels, strict=True)) == {"name:10": 2, "label:10": 10}


NAMES = ["bear", "fox", "goldfish", "tench, Tinca tinca", "ü", "é"]


def test_names_with_commas_and_letters_of_other_languages(numbered, refused, tmp_path):
    names = [*NAMES, *(f"class {i}" for i in range(len(NAMES), 12))]
    ckpt = changed_checkpoint(numbered.run, tmp_path / "named.pt", meta={"classes": names})
    given = ["--ckpt", ckpt, "--num-images", 2, *EULER]
    wanted = {"label:3": [3, 3], "fox,ü": [1, 4], "fox, ü": [1, 4], "name:fox,label:3": [1, 3]}
    for number, (words, labels) in enumerate(wanted.items()):
        call(sample, *given, "--classes", words, "--out", tmp_path / str(number))
        assert samples_in(tmp_path / str(number))["labels"].tolist() == labels
    for words in ("tench, Tinca tinca", "tench", "Fox", "12", "-1", "1.0", "fox,"):
        refused(sample, *given, "--classes", words, "--out", tmp_path / "no", says=["--classes"])
    assert not (tmp_path / "no").exists()


def test_random_labels_are_a_function_of_seed_and_index(numbered, tmp_path):
    """So a part of the images has the labels that it has in all of them."""

    def labels(name, *more):
        given = ["--ckpt", numbered.run, *EULER, "--labels", "random", "--out", tmp_path / name]
        call(sample, *given, *more)
        return samples_in(tmp_path / name)["labels"].tolist()

    whole = labels("a", "--num-images", 40)
    assert whole[:9] == labels("b", "--num-images", 9, "--batch-size", 4)
    assert whole[:9] != labels("c", "--num-images", 9, "--seed", 1)
    assert whole != [i % 12 for i in range(40)] and set(whole) <= set(range(12))
    assert max(Counter(whole).values()) > 4  # 40 over 12 classes in turn are 3 or 4 each
    assert {3, 5} == set(labels("d", "--num-images", 12, "--classes", "label:3,label:5"))


def test_samples_say_how_they_were_made(numbered, tmp_path):
    given = [
        "--ckpt",
        numbered.run,
        "--num-images",
        4,
        *EULER,
        "--cfg",
        1.5,
        "--guidance-high",
        0.5,
    ]
    call(sample, *given, "--out", tmp_path)
    settings = json.loads(samples_in(tmp_path)["settings"].item())
    wanted = {"labels": "balanced", "mode": "euler", "steps": 2, "cfg": 1.5, "guidance_high": 0.5}
    assert wanted.items() <= settings.items() and settings["num_images"] == 4


@pytest.mark.parametrize("mode", ["euler", "heun"])
def test_the_samplers_state_does_not_forget_small_steps(mode):
    """A float32 network, 10,000 steps of 1e-9 on numbers about 1: in float32 nothing would move."""

    class Slow(torch.nn.Linear):
        def forward(self, x, t, y):
            assert x.dtype == t.dtype == torch.float32
            return torch.full_like(x, 1e-5), {}

    noise = torch.linspace(0.5, 2, 32).reshape(2, 1, 4, 4)
    x = sample.sample(Slow(1, 1), noise, torch.zeros(2, dtype=torch.long), 1, 10_000, mode)
    assert x.dtype == torch.float64
    assert (noise.double() - x).sub(1e-5).abs().max() < 1e-10


# ---- the VAE that decodes


def test_the_vae_has_moved_or_is_another(numbered, refused, tmp_path, capsys):
    """What decodes is compared by content; what the message asks for is taken."""
    shutil.copy(numbered.vae, tmp_path / "moved.pt")
    meta = {"vae": {**LatentFolder(numbered.data).meta["vae"], "path": str(tmp_path / "gone.pt")}}
    ckpt = changed_checkpoint(numbered.run, tmp_path / "ckpt.pt", meta=meta)
    given = ["--ckpt", ckpt, "--num-images", 2, *EULER, "--out", tmp_path / "out"]
    refused(sample, *given, says=["gone.pt", "--vae"])
    saved = torch.load(numbered.vae, weights_only=True)
    torch.save({**saved, "scale": 0.5}, tmp_path / "scale.pt")
    refused(sample, *given, "--vae", tmp_path / "scale.pt", says=["scale.pt"])
    saved["model"]["decoder.conv_out.bias"] += 0.1
    torch.save(saved, tmp_path / "gone.pt")  # another one, where the old one was
    refused(sample, *given, says=["gone.pt", "--vae"])
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    call(sample, *given, "--vae", tmp_path / "moved.pt")
    assert capsys.readouterr().err == ""
    given[-1] = tmp_path / "other"
    call(sample, *given, "--vae", tmp_path / "gone.pt")
    assert "warning: " in capsys.readouterr().err  # who insists is told
