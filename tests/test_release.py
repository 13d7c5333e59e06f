"""experiments/methods/measured_release.py: the rule against a plain loop, and runs across it."""

import json
import math

import pytest
import torch
from conftest import TRAIN, call

import common
from experiments.methods import measured_release


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").open()]


def release(**settings):
    args = measured_release.Settings(model="SiT-Ti/8", projector_dim=8, **settings)
    loss = measured_release.Release(args, 2, args.guide_weight)
    loss.module = torch.nn.Module()
    loss.module.register_buffer("release", torch.tensor([0, 0, 0, -1, 0, 0], dtype=torch.float64))
    return loss


@pytest.mark.parametrize("over", [400_000, 1600])
def test_the_rule_against_a_plain_loop(over):
    """eta falls by half and stays there: the weight falls when the slow average has come down."""
    decays = (0.999, 0.99995) if over == 400_000 else (0.75, 0.9875)
    steps, loss = min(over, 2000), release(release_over=over, guide_weight=0.4)
    etas = [0.4 * (1 + 0.5 ** (step / (0.01 * over))) for step in range(steps)]
    slow = fast = etas[0]
    wanted, released = [], None
    for step in range(steps):
        if step > 1:
            fast = decays[0] * fast + (1 - decays[0]) * etas[step - 1]
            slow = decays[1] * slow + (1 - decays[1]) * etas[step - 1]
        if released is None and step >= over / 8 and (slow - fast) / slow < 0.02:
            released = step
        way = 0 if released is None else min(1, (step - released) / (over / 8))
        wanted.append(0.2 * (1 + math.cos(math.pi * way)))
    for step in range(steps):
        loss.measure()
        assert loss.weight == pytest.approx(wanted[step], abs=1e-9), step
        loss.module.release[4:] = torch.tensor([3 * etas[step], 3], dtype=torch.float64)
    assert loss.module.release[1:3].tolist() == pytest.approx([fast, slow], rel=1e-9)
    if over == steps:
        assert over / 8 < released < over / 2 and loss.until == released + over // 8
    else:
        assert released is None and loss.until > over


def test_a_student_that_goes_away_is_released_after_the_warm_up():
    loss = release(release_over=80)
    for step in range(12):
        loss.measure()
        assert (loss.module.release[3].item() >= 0) == (step >= 10)
        loss.module.release[4:] = torch.tensor([0.1 + 0.01 * step, 1.0])


def test_eta_is_the_mean_over_images_and_tokens():
    loss = release()
    answers, targets = torch.randn(2, 3, 5, 7).double()
    squares = loss.distance(answers, targets)
    assert torch.allclose(squares, (answers - targets).square().mean(dim=(1, 2)))
    loss.distance(answers[:1], targets[:1])  # another share of the batch
    etas = []
    for image in (0, 1, 2, 0):
        for a, b in zip(answers[image], targets[image], strict=True):
            etas.append((1 - (a @ b) / (a.norm() * b.norm())).item() / 2 / 5)
    assert loss.module.release[4:].tolist() == pytest.approx([sum(etas), 4])


@pytest.mark.parametrize("accum", [1, 2])
def test_runs_that_are_cut_before_in_and_after_the_fall(accum, latents, runs, tmp_path):
    """Released after 3 steps, at zero and dropped after 6: bit for bit wherever it is cut."""
    flags = [*TRAIN, "--data", latents, "--teacher", runs / "teacher/teacher.pt", "--log-every", 1]
    flags += ["--release-over", 24, "--release-below", 1, "--accum", accum]
    whole = tmp_path / "whole"
    call(measured_release, *flags, "--steps", 8, "--out", whole)
    lines = records(whole)
    assert [line["loss_measured"] > 0 for line in lines] == [True] * 6 + [False] * 2
    last = common.load_file(whole / "ckpt-0000008.pt")
    assert last["projector"] is None and last["projector_opt"] is None
    for cut in (2, 4, 6, 7) if accum == 1 else (5,):
        out = tmp_path / f"cut-{cut}"
        for steps in (cut, 8):
            call(measured_release, *flags, "--steps", steps, "--out", out)
        assert records(out) == lines, cut
        saved = common.load_file(out / "ckpt-0000008.pt")["model"]
        assert all(torch.equal(saved[key], last["model"][key]) for key in saved), cut
