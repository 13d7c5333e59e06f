"""Weights that a run starts from and leaves behind, and labels that must mean the same."""

import json

import numpy as np
import pytest
import torch
from conftest import TRAIN, call, write_folder

import models
import sample
import train_stage1
from common import UserError, fingerprint
from experiments.checkpoints import probe
from experiments.cifar10 import frontier, judge

TABLE = "y_embedder.embedding_table.weight"


def train(data, out, *flags):
    call(train_stage1, *TRAIN, "--data", data, "--out", out, *flags)
    return out


def weights(path, kind="model") -> dict:
    return torch.load(path, weights_only=True)[kind]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of eight steps, of 10 classes, whose average and weights differ."""
    folder = tmp_path_factory.mktemp("source")
    data = write_folder(folder / "data", shape=(4, 16, 16))
    return data, train(data, folder / "run", "--steps", 8, "--snapshots", 3)


def start(init, data, tmp_path, *flags) -> dict:
    """The network's weights before the first step of a run with --init."""
    seen = {}

    def look(step, *rest):
        raise KeyboardInterrupt

    class Begun(train_stage1.State):
        def __init__(self, *args):
            super().__init__(*args)
            seen.update(model=self.model.state_dict(), ema=self.ema.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage1, "State", Begun)
        patch.setattr(train_stage1, "draw", look)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "new", "--steps", 2, "--init", init, *flags)
    return seen


# ---- --init


def test_a_run_starts_from_the_average_of_another(source, tmp_path, capsys):
    data, run = source
    begun = start(run, data, tmp_path)
    saved = torch.load(run / "ckpt-0000008.pt", weights_only=True)
    assert not torch.equal(saved["ema"][TABLE], saved["model"][TABLE])
    for part in begun.values():
        assert all(torch.equal(part[name], value) for name, value in saved["ema"].items())
    said = capsys.readouterr().out
    assert "starts from step 8" in said and fingerprint(*saved["ema"].values())[:12] in said


def test_an_untrained_average_gives_way_to_the_weights(source, tmp_path):
    data, run = source
    saved = torch.load(run / "ckpt-0000008.pt", weights_only=True)
    saved["args"].update(ema_ramp=False, ema=0.9999)
    torch.save(saved, tmp_path / "early.pt")
    begun = start(tmp_path / "early.pt", data, tmp_path)
    assert torch.equal(begun["model"][TABLE], saved["model"][TABLE])


@pytest.mark.parametrize("classes", [6, 12])
def test_other_classes_keep_all_but_the_label_table(classes, source, tmp_path, capsys):
    _, run = source
    more = write_folder(tmp_path / "more", classes=classes, shape=(4, 16, 16), seed=1)
    begun = start(run, more, tmp_path)["model"]
    theirs = weights(run / "ckpt-0000008.pt", "ema")
    assert begun[TABLE].shape == (classes + 1, theirs[TABLE].shape[1])
    assert torch.equal(begun[TABLE][-1], theirs[TABLE][-1])  # the null label
    assert not torch.equal(begun[TABLE][0], theirs[TABLE][0])
    assert 0.015 < begun[TABLE][:-1].std() < 0.025  # DiT's N(0, 0.02)
    assert all(torch.equal(begun[name], theirs[name]) for name in theirs if name != TABLE)
    assert "start anew" in capsys.readouterr().out


def test_the_random_stream_does_not_see_it(source, tmp_path):
    """Projectors start as they would without --init, which moves no draw."""
    data, run = source
    one = train(data, tmp_path / "a", "--steps", 1, "--init", run, "--lr", 1e-12)
    two = train(data, tmp_path / "b", "--steps", 1, "--lr", 1e-12)
    heads = [weights(out / "ckpt-0000001.pt", "projector") for out in (one, two)]
    assert all(torch.allclose(heads[0][name], heads[1][name], atol=1e-9) for name in heads[0])


def test_what_does_not_fit_is_refused_by_name(source, tmp_path):
    data, run = source
    for flags, name in (
        (["--model", "SiT-N/8"], "blocks.6"),
        (["--model", "SiT-Ti/4"], "pos_embed"),
        (["--no-qk-norm"], "q_norm"),
    ):
        with pytest.raises(UserError, match=f"does not fit.*{name}"):
            train(data, tmp_path / "no", "--steps", 1, "--init", run, *flags)
        assert not (tmp_path / "no").exists()


def test_the_weights_belong_to_the_run(source, tmp_path):
    """Another file does not continue it, nor does none; the same weights elsewhere do."""
    data, run = source
    out = train(data, tmp_path / "run", "--steps", 2, "--init", run)
    kept = weights(out / "ckpt-0000002.pt")
    for flags in ([], ["--init", run / "snapshot-0000003.pt"]):
        with pytest.raises(UserError, match="other settings: --init"):
            train(data, out, "--steps", 4, *flags)
    (tmp_path / "copy.pt").write_bytes((run / "ckpt-0000008.pt").read_bytes())
    train(data, out, "--steps", 4, "--init", tmp_path / "copy.pt")
    whole = train(data, tmp_path / "whole", "--steps", 4, "--init", run)
    assert not torch.equal(kept[TABLE], weights(out / "ckpt-0000004.pt")[TABLE])
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    for kind in ("model", "ema"):
        pairs = [weights(path / "ckpt-0000004.pt", kind) for path in (out, whole)]
        assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])


# ---- --snapshots


def test_a_snapshot_is_the_average_alone_and_stays(source, tmp_path):
    data, run = source
    names = sorted(path.name for path in run.glob("snapshot-*"))
    assert names == ["snapshot-0000003.pt", "snapshot-0000006.pt"]
    saved = torch.load(run / names[1], weights_only=True)
    assert "model" not in saved and "opt" not in saved and saved["step"] == 6
    exact = train(data, tmp_path / "six", "--steps", 6)
    average = weights(exact / "ckpt-0000006.pt", "ema")
    assert all(torch.equal(saved["ema"][name], average[name]) for name in average)
    size = (run / names[1]).stat().st_size
    assert size < 0.27 * (run / "ckpt-0000008.pt").stat().st_size
    # A run of its own is not continued from it, and --keep counts checkpoints alone
    few = train(data, tmp_path / "few", "--steps", 8, "--snapshots", 1, "--keep", 1)
    assert len(list(few.glob("snapshot-*.pt"))) == 8 and len(list(few.glob("ckpt-*.pt"))) == 1


def test_a_snapshot_samples(source, tmp_path):
    _, run = source
    flags = ["--num-images", 4, "--steps", 2, "--mode", "euler", "--device", "cpu", "--latents"]
    network, saved = models.load_checkpoint(run / "snapshot-0000006.pt")
    call(sample, *flags, "--ckpt", run / "snapshot-0000006.pt", "--out", tmp_path)
    found = np.load(tmp_path / "latents.npz")["latents"]
    noise, _ = sample.initial_noise(0, range(4), (4, 16, 16))
    x0 = sample.sample(network, noise, torch.arange(4), 10, steps=2, mode="euler")
    assert np.allclose(found, x0 / saved["meta"]["scale"], atol=1e-6)


# ---- --labels data


def test_labels_are_drawn_with_the_training_sets_shares(source, tmp_path):
    data = write_folder(tmp_path / "tail", classes=3, shape=(4, 16, 16))
    np.save(data / "labels.npy", np.array([0] * 40 + [1] * 7 + [2]))
    run = train(data, tmp_path / "run", "--steps", 4)
    flags = ["--ckpt", run, "--steps", 1, "--mode", "euler", "--latents", "--device", "cpu"]
    call(sample, *flags, "--num-images", 300, "--labels", "data", "--out", tmp_path / "s")
    drawn = np.load(tmp_path / "s/latents.npz")["labels"]
    counts = np.bincount(drawn, minlength=3)
    assert abs(counts - 300 * np.array([40, 7, 1]) / 48).max() < 3 * (300 * 0.83 * 0.17) ** 0.5
    assert len(set(drawn[:40])) > 1  # drawn, not in turn
    # The first of more images are the same images, and of some classes alone the shares are theirs
    call(sample, *flags, "--num-images", 20, "--labels", "data", "--out", tmp_path / "t")
    assert (np.load(tmp_path / "t/latents.npz")["labels"] == drawn[:20]).all()
    some = ["--classes", "2,1", "--num-images", 200]
    call(sample, *flags, *some, "--labels", "data", "--out", tmp_path / "u")
    counts = np.bincount(np.load(tmp_path / "u/latents.npz")["labels"], minlength=3)
    assert counts[0] == 0 and 0 < counts[2] < 60  # 25 expected


def test_a_checkpoint_without_counts_says_so(source, tmp_path):
    _, run = source
    saved = torch.load(run / "ckpt-0000008.pt", weights_only=True)
    del saved["meta"]["counts"]
    torch.save(saved, tmp_path / "old.pt")
    flags = ["--ckpt", tmp_path / "old.pt", "--steps", 1, "--latents", "--device", "cpu"]
    with pytest.raises(UserError, match="does not count its classes; use --labels random"):
        call(sample, *flags, "--num-images", 2, "--labels", "data", "--out", tmp_path / "a")
    call(sample, *flags, "--num-images", 2, "--labels", "random", "--out", tmp_path / "b")


# ---- one label, one class


def test_the_same_names_in_another_order_are_no_same_classes(capsys):
    by_number, by_name = ["0", "1", "2", "10"], ["0", "1", "10", "2"]
    models.check_classes("x", by_number, by_number)
    assert capsys.readouterr().err == ""
    for theirs in (by_name, ["0", "1", "2"], [*by_number, "3"]):
        with pytest.raises(UserError, match="x: has .* first; here are 4"):
            models.check_classes("x", theirs, by_number)
    models.check_classes("x", ["cat", "dog", "cow", "hen"], by_number)
    said = capsys.readouterr().err
    assert "['cat', 'dog', 'cow']" in said and "['0', '1', '2']" in said


def test_probe_and_init_refuse_another_order(source, tmp_path):
    data, run = source
    network, saved = models.load_checkpoint(run)
    meta = json.loads((data / "meta.json").read_text())
    turned = write_folder(tmp_path / "turned", shape=(4, 16, 16))
    meta["classes"] = meta["classes"][::-1]
    (turned / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="same classes in the same order"):
        probe.find_latents(turned, network, saved["meta"]["classes"])
    with pytest.raises(UserError, match="same classes in the same order"):
        train(turned, tmp_path / "run", "--steps", 1, "--init", run)


def test_judges_refuse_another_order(tmp_path):
    names = ["cat", "dog", "hen"]
    pixels, labels = np.zeros((3, 8, 8, 3), np.uint8), np.arange(3)
    for given, right in ((names, True), (names[::-1], False)):
        path = tmp_path / f"{right}.npz"
        np.savez(path, arr_0=pixels, labels=labels, settings=json.dumps({"names": given}))
        saved = {"classes": 3, "size": 8, "names": names}
        known = frontier.Judge(None, "", 8, 3, names)
        if right:
            judge.read_samples(path, saved)
            frontier.check_judges({"cnn": known}, path, 8, given)
        else:
            with pytest.raises(UserError, match="same classes in the same order"):
                judge.read_samples(path, saved)
            with pytest.raises(UserError, match="same classes in the same order"):
                frontier.check_judges({"cnn": known}, path, 8, given)
    without = tmp_path / "older.npz"
    np.savez(without, arr_0=pixels, labels=labels)
    judge.read_samples(without, saved)
