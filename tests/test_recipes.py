"""The recipes in runs/, and REPA with its encoder in the step."""

import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, call

import vae_latents
from common import UserError
from experiments.methods import repa_dino
from experiments.methods.repa_dino import DEVIATION, MEAN, RepaDino

RECIPES = sorted((ROOT / "runs").glob("*.sh"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_a_shell_script_that_says_what_to_expect(recipe):
    subprocess.run(["bash", "-n", recipe], check=True)
    text = recipe.read_text()
    assert text.startswith("#!") and re.search(r"^set -e?u", text, re.M)
    assert recipe.name in (ROOT / "runs/README.md").read_text()


class Encoder(torch.nn.Module):
    """In the place of DINOv2: a token is the mean of the 14 x 14 pixels of its patch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward_features(self, images):
        means = torch.nn.functional.avg_pool2d(images, 14).flatten(2).transpose(1, 2)
        return {"x_norm_patchtokens": means * self.weight}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(RepaDino, "load_encoder", lambda self: Encoder())
    monkeypatch.setitem(repa_dino.WIDTHS, "vitb14", 3)


def test_its_target_is_the_encoders_answer_to_the_picture(fake, latents):
    """Against a plain loop: one picture at a time, one patch at a time."""
    folder = vae_latents.LatentFolder(latents)
    args = repa_dino.Settings(model="SiT-Ti/8", depth=2, weight=0.5)
    loss = RepaDino(args)
    loss.prepare(folder, torch.device("cpu"))
    rows = torch.tensor([3, 17])
    batch = type("Batch", (), {"indices": rows, "x0": torch.zeros(2, 4, 16, 16)})
    tokens = loss.target(batch)
    side = folder.meta["height"] // 8
    assert tokens.shape == (2, side**2, 3)
    for i, row in enumerate(rows.tolist()):
        picture = vae_latents.open_image(loss.files[row], folder.meta["image_size"])
        image = (picture / 255 - np.array(MEAN)) / np.array(DEVIATION)
        image = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]
        image = torch.nn.functional.interpolate(image, 14 * side, mode="bicubic")[0]
        for place in range(side**2):
            y, x = 14 * (place // side), 14 * (place % side)
            mean = image[:, y : y + 14, x : x + 14].mean(dim=(1, 2))
            assert torch.allclose(tokens[i, place], mean, atol=1e-4)


def test_it_trains_and_names_what_is_missing(fake, latents, tmp_path):
    flags = [*TRAIN, "--data", latents, "--depth", 2, "--steps", 4]
    call(repa_dino, *flags, "--out", tmp_path / "run")
    log = (tmp_path / "run/log.jsonl").read_text()
    values = [float(value) for value in re.findall(r'"loss_repa": ([-.\d]+)', log)]
    assert len(values) == 2 and all(-1 <= value < 1 and value != 0 for value in values)
    with pytest.raises(UserError, match="is not there; say with --images"):
        call(repa_dino, *flags, "--images", tmp_path, "--out", tmp_path / "b")
