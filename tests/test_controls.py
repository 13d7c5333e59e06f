"""experiments/methods/controls.py: each target of stage 2 against a float64 loop over images."""

import json

import pytest
import torch
from conftest import TRAIN, call, tiny, write_folder

import common
import train_stage2
from common import UserError
from experiments.methods import controls
from train_stage1 import draw, make_batch
from vae_latents import LatentFolder

B, N, S = 24, 48, 3.0


@pytest.fixture
def folder(tmp_path):
    return LatentFolder(write_folder(tmp_path / "data", num=N, classes=5))


def control(target, folder):
    """(A Control of `target` with a teacher in float64, a batch in float64)."""
    args = controls.Settings(model="SiT-Ti/8", batch_size=B, target=target)
    loss = controls.Control(args, 2)
    loss.s, loss.teacher = S, tiny(num_classes=5, seed=4, name="SiT-P").double().cut(3)
    loss.folder = folder
    loss.images_of = [torch.nonzero(folder.labels == c)[:, 0] for c in range(5)]
    draws = draw(3, args, folder, "cpu")
    known = {name: x for name, x in vars(draws).items() if x is not None}
    known = {name: x.double() if x.is_floating_point() else x for name, x in known.items()}
    return loss, make_batch(folder, type(draws)(**known))


@torch.no_grad()
def tokens(loss, x_t, t, y):
    """One image's tokens after the teacher's last block, (T, D)."""
    _, tapped = loss.teacher(x_t[None], t[None], torch.tensor([int(y)]), taps=[3])
    return tapped[3][0]


def guided(loss, x_t, t, y):
    f_uncond = tokens(loss, x_t, t, 5)
    return f_uncond + S * (tokens(loss, x_t, t, y) - f_uncond)


def close(got, wanted):
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_true_is_f_g(folder):
    loss, batch = control("true", folder)
    wanted = [guided(loss, batch.x_t[i], batch.t[i], batch.y[i]) for i in range(B)]
    close(loss.target(batch), torch.stack(wanted))


def test_wrong_is_f_g_of_another_label(folder):
    loss, batch = control("wrong", folder)
    told = []
    for i, got in enumerate(loss.target(batch)):
        every = [guided(loss, batch.x_t[i], batch.t[i], y) for y in range(5)]
        distances = [(got - f_g).norm().item() for f_g in every]
        told.append(min(range(5), key=distances.__getitem__))
        close(got, every[told[i]])
    assert all(a != b for a, b in zip(told, batch.y.tolist(), strict=True))


def test_wrong_labels_are_even_among_the_others():
    u = (torch.arange(9000) + 0.5) / 9000
    for y in (0, 4, 9):
        labels = controls.wrong_labels(torch.full((9000,), y), u, 10)
        assert labels.bincount(minlength=10).tolist() == [1000 * (c != y) for c in range(10)]
    almost = torch.tensor([1 - 2**-24])  # the largest that torch.rand draws
    for classes in range(2, 1001):
        assert controls.wrong_labels(torch.tensor([1]), almost, classes) != 1


def test_rescaled_is_f_c_as_long_as_f_g(folder):
    loss, batch = control("rescaled", folder)
    for i, got in enumerate(loss.target(batch)):
        f_cond = tokens(loss, batch.x_t[i], batch.t[i], batch.y[i])
        f_guided = guided(loss, batch.x_t[i], batch.t[i], batch.y[i])
        for place in range(len(got)):
            length = f_guided[place].square().sum().sqrt() / f_cond[place].square().sum().sqrt()
            close(got[place], f_cond[place] * length)


def test_shuffled_is_f_g_of_the_next_of_the_class(folder):
    loss, batch = control("shuffled", folder)
    labels, sources = batch.y.tolist(), []
    for i, got in enumerate(loss.target(batch)):
        source = next(j % B for j in range(i + 1, i + 1 + B) if labels[j % B] == labels[i])
        close(got, guided(loss, batch.x_t[source], batch.t[source], batch.y[source]))
        sources.append(source)
    assert sorted(sources) == list(range(B))  # a permutation
    assert all(a != b for a, b in enumerate(sources))
    assert controls.next_of_class(torch.tensor([3, 1, 3, 2, 3])).tolist() == [2, 1, 4, 3, 0]


def test_other_is_f_g_of_an_image_of_the_class(folder):
    loss, batch = control("other", folder)
    drawn = set()
    for i, got in enumerate(loss.target(batch)):
        same = [j for j in range(N) if folder.labels[j] == batch.y[i]]
        source = same[int(batch.u[i].item() * len(same))]
        drawn.add(source)
        mean, std = torch.from_numpy(folder.moments[source]).double().chunk(2)
        x_t = (1 - batch.t[i]) * (mean + std * batch.posterior[i]) + batch.t[i] * batch.eps[i]
        close(got, guided(loss, x_t, batch.t[i], batch.y[i]))
    assert len(drawn) > B / 2


def test_true_is_stage_2_and_the_others_continue_bit_for_bit(runs, latents, tmp_path):
    """The same log as train_stage2.py; cut and continued, the same weights as in one piece."""
    flags = [*TRAIN, "--data", latents, "--teacher", runs / "teacher/teacher.pt"]

    def weights(target, name, *steps):
        for until in steps:
            more = ["--steps", until, "--out", tmp_path / name]
            call(controls, *flags, *more, "--target", target)
        return common.load_file(tmp_path / name / f"ckpt-{steps[-1]:07d}.pt")["model"]

    def log(name):
        return [json.loads(line) for line in (tmp_path / name / "log.jsonl").open()]

    call(train_stage2, *flags, "--steps", 8, "--out", tmp_path / "stage2")
    weights("true", "true", 8)
    assert log("true") == log("stage2")
    for target in ("wrong", "rescaled", "shuffled", "other"):
        whole, cut = weights(target, target, 8), weights(target, f"{target}-cut", 4, 8)
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
        assert log(target) != log("stage2")
    with pytest.raises(UserError, match="--target"):
        weights("rescaled", "wrong", 8)


def test_one_class_has_no_wrong_label(tmp_path, runs):
    data = write_folder(tmp_path / "data", classes=1)
    flags = [*TRAIN, "--data", data, "--teacher", runs / "teacher/teacher.pt", "--steps", 2]
    with pytest.raises(UserError, match="--target wrong: the data has one class"):
        call(controls, *flags, "--target", "wrong", "--out", tmp_path / "out")
