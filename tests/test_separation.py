"""experiments/methods/attention_separation.py: the network, its draws, its runs, with stage 2."""

import json

import pytest
import torch
from conftest import TRAIN, call, tiny, write_folder

import common
import models
import train_stage1
from common import UserError
from experiments.methods import attention_separation as separation
from train_stage1 import draw, make_batch
from vae_latents import LatentFolder

CPU = torch.device("cpu")


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").open()]


def test_the_tokens_and_the_second_time_are_even_and_follow_nothing():
    torch.manual_seed(0)
    velocity = torch.randn(4000, 4, 16, 16)
    second, s = separation.second_time(velocity, 4, 0.25)
    assert second.shape == (4000, 16) and (second.sum(dim=1) == 4).all()
    assert (second.float().mean(dim=0) - 0.25).abs().max() < 0.035  # five deviations
    counts = torch.histc(s, 10, 0, 1)
    assert (counts - 400).abs().max() < 95 and 0 <= s.min() and s.max() < 1
    noise = velocity[:, 0, ::4, ::4].flatten(1)
    signals = {"noise": noise, "part": noise % 1, "s": s[:, None].expand(-1, 16)}
    for name, signal in signals.items():
        both = torch.stack([signal.flatten(), second.float().flatten()])
        assert both.corrcoef()[0, 1].abs() < 0.02, name
    for token in second.float().T:  # s does not follow one token either
        assert torch.stack([s, token]).corrcoef()[0, 1].abs() < 0.08
    pairs = second[:, 0] & second[:, 1]
    assert abs(pairs.float().mean().item() - 0.25 * 3 / 15) < 0.02
    again, _ = separation.second_time(velocity[7:9], 4, 0.25)  # a row's own, in any batch
    assert torch.equal(again, second[7:9])
    least, _ = separation.second_time(velocity, 8, 0.01)
    assert (least.sum(dim=1) == 1).all()


@torch.no_grad()
def test_against_two_sequences_of_tokens():
    """The tokens of one time are a shorter sequence for the plain blocks, without the others."""
    model = tiny(patch=4).double()
    x0, eps = torch.randn(2, 3, 4, 16, 16).double()
    t, s, y = torch.rand(3).double(), torch.rand(3).double(), torch.tensor([1, 10, 4])
    second = torch.rand(3, 16).argsort(dim=1) < 5
    noise_level = t.view(-1, 1, 1, 1)
    x_t = (1 - noise_level) * x0 + noise_level * eps
    got, tapped = separation.separated(model, x_t, t, y, eps - x0, second, s, taps=[2, 8])
    for i in range(3):
        patches = torch.zeros(16, 4 * 4 * 4).double()
        for time, own in ((t[i], ~second[i]), (s[i], second[i])):
            x = (1 - time) * x0[i] + time * eps[i]
            h = model.x_embedder["proj"](x[None]).flatten(2).transpose(1, 2) + model.pos_embed
            h = h[:, own]
            c = model.t_embedder(time[None]) + model.y_embedder["embedding_table"](y[i : i + 1])
            for depth, block in enumerate(model.blocks, 1):
                h = block(h, c)
                if depth in (2, 8):
                    torch.testing.assert_close(tapped[depth][i, own], h[0])
            patches[own] = model.final_layer(h, c)[0]
        torch.testing.assert_close(got[i], models.unpatchify(patches[None], 4, 4)[0])


def test_it_trains_continues_bit_for_bit_and_is_a_plain_network(latents, tmp_path):
    flags = [*TRAIN, "--model", "SiT-Ti/4", "--data", latents]
    whole, cut, plain = (tmp_path / name for name in ("whole", "cut", "plain"))
    call(separation, *flags, "--steps", 8, "--out", whole)
    for steps in (4, 8):
        call(separation, *flags, "--steps", steps, "--out", cut)
    assert train_stage1.LossNetwork is not separation.SeparatedNetwork  # it was given back
    assert records(whole) == records(cut)
    saved = [common.load_file(run / "ckpt-0000008.pt")["model"] for run in (whole, cut)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    model, _ = models.load_checkpoint(whole)
    assert type(model) is models.SiT
    call(train_stage1, *flags, "--align-weight", 0, "--steps", 8, "--out", plain)
    first = [records(run)[0]["loss_diff"] for run in (whole, plain)]
    assert first[0] != first[1]
    with pytest.raises(UserError, match="--share 0.25 -> .no such setting"):
        call(train_stage1, *flags, "--align-weight", 0, "--steps", 12, "--out", whole)


def test_guidance_is_the_mean_over_the_tokens_at_t(latents, runs, tmp_path):
    """L_diff and L_guide of the loop against sums over the tokens, in float64."""
    args = separation.Settings(model="SiT-Ti/8", batch_size=16, t_min=0.2, share=0.5)
    args.teacher = str(runs / "teacher/teacher.pt")
    folder, loss = LatentFolder(latents), separation.SeparatedGuidance(args, 3)
    loss.prepare(folder, CPU)
    model = tiny(num_classes=8).double()
    loss.module, loss.rows = loss.projector(model).double(), slice(3, 12)
    batch = make_batch(folder, draw(2, args, folder, "cpu"))
    known = {name: x for name, x in vars(batch).items() if x is not None}
    known = {name: x.double() if x.is_floating_point() else x for name, x in known.items()}
    batch, teacher = type(batch)(**known), loss.teacher.double()
    network = separation.SeparatedNetwork(model, [loss], args.share)
    targets = [loss.target(batch[loss.rows])]
    with torch.no_grad():
        diff, guide = network(batch.x_t, batch.t, batch.y_input, batch.velocity, targets)
        second, s = separation.second_time(batch.velocity, 8, 0.5)
        moved = separation.separated(
            model, batch.x_t, batch.t, batch.y_input, batch.velocity, second, s, taps=[3]
        )
        wanted = 0.0
        for i in range(16):
            if not 0.2 <= batch.t[i] <= 0.7:
                continue
            features = []
            for label in (batch.y[i], torch.tensor(8)):
                _, tapped = teacher(
                    batch.x_t[i : i + 1], batch.t[i : i + 1], label[None], taps=[teacher.depth]
                )
                features.append(tapped[teacher.depth][0])
            f_guided = features[1] + loss.s * (features[0] - features[1])
            answers = loss.module(moved[1][3][i : i + 1])[0]
            own = [(answers[k] - f_guided[k]).square().mean() for k in range(4) if not second[i, k]]
            assert len(own) == 2
            wanted += sum(own).item() / 2 / 16
    assert diff.item() == pytest.approx((moved[0] - batch.velocity).square().mean().item(), 1e-5)
    assert guide.item() == pytest.approx(wanted, rel=1e-4) and wanted > 0
    flags = [*TRAIN, "--data", latents, "--teacher", args.teacher, "--out", tmp_path / "both"]
    call(separation, *flags, "--steps", 2)
    assert records(tmp_path / "both")[0]["loss_guide"] > 0


def test_the_extra_cost_is_that_of_the_second_modulation():
    """Counted over the layers that see two times."""
    model = tiny()
    twice = [block.adaLN_modulation[1] for block in model.blocks]
    twice += [
        model.final_layer.adaLN_modulation[1],
        model.t_embedder.mlp[0],
        model.t_embedder.mlp[2],
    ]
    weights = sum(layer.weight.numel() for layer in twice)
    assert separation.extra_cost(model) == pytest.approx(2 * weights / model.forward_flops())


def test_no_share_of_nothing(tmp_path):
    data = write_folder(tmp_path / "data")
    for share in ("0", "1"):
        with pytest.raises(UserError, match="--share"):
            call(separation, *TRAIN, "--data", data, "--share", share)
