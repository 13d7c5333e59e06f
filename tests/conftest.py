"""Shared by the tests: the project on the path, tiny latents and a trained pair of runs, made once, and a way to run scripts."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

TRAIN = ["--model", "SiT-Ti/8", "--batch-size", "8", "--lr", "1e-3", "--projector-dim", "32", "--log-every", "2", "--save-every", "4",
         "--sample-every", "0", "--device", "cpu"]


def script(name, *args, processes=1, env=None, timeout=300):
    """Run one of the project's scripts from ROOT, under torchrun if `processes` > 1; the CompletedProcess, never raising."""
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [])]
    return subprocess.run([*command, str(ROOT / name), *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})


def ok(*args, **kwargs):
    """`script`, asserting success; its stdout."""
    result = script(*args, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def write_folder(path, num=48, classes=10, shape=(4, 16, 16), seed=0):
    """A latent folder of random numbers, written by hand from the documented format, not by the code under test."""
    import json
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=(num, *shape)), rng.uniform(0.05, 0.2, size=(num, *shape))
    np.save(path / "moments.npy", np.concatenate([mean, std], axis=1).astype(np.float16))
    np.save(path / "labels.npy", np.arange(num, dtype=np.int64) % classes)
    (path / "meta.json").write_text(json.dumps({
        "format": 1, "image_size": 32, "classes": [f"class {i}" for i in range(classes)], "channels": shape[0], "height": shape[1],
        "width": shape[2], "scale": 1.0, "num_images": num, "vae": {"path": "vae.pt", "sha256": None}}))
    return path


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A real latent folder: 60 drawn shapes, a small VAE of 20 steps."""
    folder = tmp_path_factory.mktemp("latents") / "shapes"
    ok("vae_latents.py", "--dataset", "shapes", "--num", 60, "--vae-factor", 2, "--vae-steps", 20, "--batch-size", 16, "--out", folder, "--device", "cpu")
    return folder


@pytest.fixture(scope="session")
def runs(latents, tmp_path_factory):
    """Stage 1 (8 steps), its teacher and stage 2 (8 steps, guidance ending after 5) on those latents: a folder of out/ folders."""
    out = tmp_path_factory.mktemp("runs")
    ok("train_stage1.py", *TRAIN, "--data", latents, "--steps", 8, "--out", out / "stage1")
    ok("build_teacher.py", "--ckpt", out / "stage1/ckpt.pt", "--out", out / "teacher", "--probe-num", 40, "--device", "cpu")
    ok("train_stage2.py", *TRAIN, "--data", latents, "--steps", 8, "--guide-steps", 5, "--teacher", out / "teacher/teacher.pt",
       "--out", out / "stage2")
    return out
