"""Several auxiliary losses in one run, shapes, groups of weights, the distribution of t."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TRAIN, call, tiny, write_folder

import common
import models
import train_stage1
from common import UserError
from experiments.methods import stage2_internal
from models import checkpoints
from train_stage1 import Alignment, Auxiliary, LossNetwork, State, draw, rows_in_range, train

CPU = torch.device("cpu")


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").open()]


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / "data")


def settings(data, out, **more):
    where = {"data": str(data), "out": str(out), "model": "SiT-Ti/8", "device": "cpu"}
    more = {"batch_size": 8, "steps": 4, "projector_dim": 16, "log_every": 2, "ema": 0.9, **more}
    return train_stage1.Settings(**where, **more)


# ---- several losses


def test_stage_2_with_a_head_added_trains_continues_and_outlives_guidance(runs, latents, tmp_path):
    """Both are logged; the cut run is the whole one, bit for bit; the teacher alone goes."""
    flags = [*TRAIN, "--data", latents, "--guide-steps", 5, "--save-every", 3]
    flags += ["--teacher", runs / "teacher/teacher.pt"]
    call(stage2_internal, *flags, "--steps", 8, "--out", tmp_path / "whole")
    for steps in (3, 8):
        call(stage2_internal, *flags, "--steps", steps, "--out", tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    saved, whole = (
        common.load_file(tmp_path / run / "ckpt-0000008.pt") for run in ("cut", "whole")
    )
    for name in ("model", "ema", "projector_internal"):
        for key, tensor in whole[name].items():
            assert torch.equal(tensor, saved[name][key]), (name, key)
    assert saved["projector"] is None and saved["projector_opt"] is None  # guidance has ended
    assert saved["projector_opt_internal"]["state"]
    steps = {line["step"]: line for line in records(tmp_path / "whole")}
    assert all(line["loss_internal"] > 0 for line in steps.values())
    assert steps[4]["loss_guide"] > 0 == steps[8]["loss_guide"]


def test_each_loss_has_its_own_block_range_weight_and_end(data, tmp_path):
    """What is logged of two losses in one run is what each one logs alone, in the first step."""

    class Clean(Alignment):
        name = "clean"

        def target(self, batch):
            return batch.x0

    def losses(args, chosen):
        first, second = Alignment(args, 2, 0.5), Clean(args, 5, 0.25, until=2)
        second.t_min, second.t_max = 0.0, 1.0
        return [loss for loss in (first, second) if loss.name in chosen]

    logs = {}
    for chosen in (["align"], ["align", "clean"]):
        args = settings(data, tmp_path / "-".join(chosen), log_every=1)
        train(args, *losses(args, chosen))
        logs[len(chosen)] = records(tmp_path / "-".join(chosen))
    one, two = logs[1], logs[2]
    assert two[0]["loss_diff"] == one[0]["loss_diff"]
    assert two[0]["loss_align"] == one[0]["loss_align"]  # its projector is drawn first
    assert [line["loss_clean"] > 0 for line in two] == [True, True, False, False]
    more = [a["grad_norm"] > b["grad_norm"] for a, b in zip(two, one, strict=True)]
    assert more[:2] == [True, True]  # the second loss has trained, too


def test_two_losses_of_one_name_are_refused(data, tmp_path):
    args = settings(data, tmp_path / "out")
    with pytest.raises(UserError, match="align.align.*name of its own"):
        train(args, Alignment(args, 2), Alignment(args, 3))
    assert not (tmp_path / "out").exists()


def test_without_a_loss_it_trains_as_with_one_of_weight_zero(data, tmp_path):
    args = settings(data, tmp_path / "none")
    train(args)
    args = settings(data, tmp_path / "zero", align_weight=0.0)
    train(args, Alignment(args, 2, 0.0))
    for none, zero in zip(records(tmp_path / "none"), records(tmp_path / "zero"), strict=True):
        assert zero.pop("loss_align") == 0.0
        assert none == zero


# ---- shapes


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(4, 1, 128), (4, 4, 1), (4, 128), (1, 4, 128)])
def test_an_answer_and_a_target_of_other_shapes_do_not_broadcast(shape):
    """(4, 4, 128) is right; each of these would broadcast, and train on something else."""
    args = train_stage1.Settings(model="SiT-Ti/8", projector_dim=16)
    loss, model = Auxiliary(args, 2), tiny()
    loss.module, loss.rows = loss.projector(model), slice(2, 6)
    network = LossNetwork(model, [loss])
    x, t, y = torch.randn(8, 4, 16, 16), torch.linspace(0, 1, 8), torch.arange(8)
    network(x, t, y, x, [torch.zeros(4, 4, 128)])
    with pytest.raises(UserError, match="answer, target, distance"):
        network(x, t, y, x, [torch.zeros(shape)])


# ---- groups of weights


@pytest.mark.quick
def test_every_group_is_clipped_and_warmed_up_at_its_own_rate(data, tmp_path, monkeypatch):
    def two_groups(weights, args):
        half = len(weights) // 2
        groups = [{"params": weights[:half]}, {"params": weights[half:], "lr": 10 * args.lr}]
        return real(groups, args)

    real = train_stage1.adamw
    monkeypatch.setattr(train_stage1, "adamw", two_groups)
    args = settings(data, tmp_path / "out", warmup=4, clip=0.5, lr=1e-3)
    state = State(args, train_stage1.LatentFolder(data), CPU)
    weights = list(state.model.parameters())
    for step in range(6):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        state.update(args, torch.zeros(1))
        rates = [group["lr"] for group in state.optimizer.param_groups]
        warm = min(1, (step + 1) / 4)
        assert rates == pytest.approx([1e-3 * warm, 1e-2 * warm], rel=1e-12)
    count = sum(weight.numel() for weight in weights)
    assert state.sums[1].item() == pytest.approx(6 * math.sqrt(count), rel=1e-6)  # of all groups


# ---- another distribution of t


@pytest.fixture
def logit_normal(monkeypatch):
    """SD3's distribution of t, in two functions."""
    monkeypatch.setattr(models, "t_of", lambda q: torch.special.ndtri(q).sigmoid())
    normal = torch.distributions.Normal(0.0, 1.0)
    monkeypatch.setattr(models, "q_of", lambda t: normal.cdf(torch.tensor(t).logit()).item())


@pytest.mark.quick
@pytest.mark.parametrize("batch_size,shares", [(256, 1), (64, 4), (7, 1)])
def test_the_slice_misses_no_row_of_another_distribution(logit_normal, data, batch_size, shares):
    args = settings(data, "none", batch_size=batch_size)
    rows = rows_in_range(batch_size, shares, 0.4, 0.7)
    folder, times = train_stage1.LatentFolder(data), []
    for step in range(50):
        t = draw(step, args, folder, CPU).t
        for share in range(shares):
            own = t[share::shares]
            inside = (own >= 0.4) & (own <= 0.7)
            outside = torch.ones_like(inside)
            outside[rows] = False
            assert not (inside & outside).any()
        times.append(t)
    t = torch.cat(times).double()
    assert 0.3 < ((t >= 0.4) & (t <= 0.7)).double().mean() < 0.6  # 46 % of a logit-normal
    assert abs(t.logit().mean()) < 0.1 and 0.85 < t.logit().std() < 1.15


def test_another_distribution_does_not_continue_a_uniform_run(data, tmp_path, request):
    args = settings(data, tmp_path / "out")
    train(args, Alignment(args, 2))
    request.getfixturevalue("logit_normal")
    args = settings(data, tmp_path / "out", steps=8)
    with pytest.raises(UserError, match="t-of-quarters"):
        train(args, Alignment(args, 2))


# ---- settings that a checkpoint does not have, or has and this run has not


def test_a_setting_that_an_older_checkpoint_lacks_is_compared_with_its_default(data, tmp_path):
    args = settings(data, tmp_path / "out")
    train(args, Alignment(args, 2))
    path = checkpoints(tmp_path / "out")[0]
    saved = torch.load(path, weights_only=True)
    del saved["args"]["label_drop"], saved["args"]["t_of_quarters"]
    torch.save(saved, path)
    with pytest.raises(UserError, match=r"--label-drop 0\.1 -> 0\.5"):
        args = settings(data, tmp_path / "out", steps=6, label_drop=0.5)
        train(args, Alignment(args, 2))
    args = settings(data, tmp_path / "out", steps=6)
    train(args, Alignment(args, 2))
    assert records(tmp_path / "out")[-1]["step"] == 6


def test_a_setting_that_this_program_lacks_does_not_go_unnoticed(data, tmp_path):
    args = settings(data, tmp_path / "out")
    train(args, Alignment(args, 2))
    path = checkpoints(tmp_path / "out")[0]
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "args": {**saved["args"], "t_std": 1.0}}, path)
    args = settings(data, tmp_path / "out", steps=6)
    with pytest.raises(UserError, match=r"--t-std 1\.0 -> \(no such setting\)"):
        train(args, Alignment(args, 2))


@pytest.mark.quick
def test_a_killed_run_continues_bit_for_bit(data, tmp_path):
    """The smallest of its kind; test_continue.py has the rest."""
    for name, lengths in (("whole", [6]), ("cut", [2, 6])):
        for steps in lengths:
            args = settings(data, tmp_path / name, steps=steps, save_every=2)
            train(args, Alignment(args, 2))
    whole, cut = (common.load_file(tmp_path / n / "ckpt-0000006.pt") for n in ("whole", "cut"))
    assert all(torch.equal(whole["model"][key], cut["model"][key]) for key in whole["model"])
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    assert np.isfinite(records(tmp_path / "cut")[-1]["loss_diff"])
