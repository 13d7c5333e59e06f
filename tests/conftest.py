"""Shared by the tests: the project on the path, tiny networks and latents, runs, ways to run."""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from warm import Process

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# A suite started with nohup, or behind a shell's &, would hand ignored signals on to its processes
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

TRAIN = "--model SiT-Ti/8 --batch-size 8 --lr 1e-3 --projector-dim 32 --log-every 2 --save-every 4"
TRAIN = f"{TRAIN} --ema-ramp --device cpu".split()  # the average of a few steps is a trained one
SMALL = [*TRAIN, *"--model SiT-N/4 --log-every 1 --save-every 2".split()]
ENCODE = "--image-size 32 --batch-size 8 --device cpu".split()
EULER = "--steps 2 --mode euler --device cpu".split()
NULL = 10  # the null label of ten classes


STARTED = []


def start(*command, **how):
    """A script at work, or a module behind "-m", as a warm.Process; the test's end is its end."""
    STARTED.append(Process(*command, **how))
    return STARTED[-1]


def torchrun(processes):
    return "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"


def script(name, *args, processes=1, env=None):
    """Run a script from ROOT, or a module such as experiments.machine.bench, under torchrun if
    `processes` > 1; the CompletedProcess. With an `env` it is a Python of its own, because torch
    reads some variables when it is imported."""
    what = ["-m", name] if str(name).startswith("experiments.") else [ROOT / name]
    command = [*(torchrun(processes) if processes > 1 else []), *what, *args]
    if env:
        command = [sys.executable, *map(str, command)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    process = start(*command)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.command, process.returncode, out, err)


def start_group(processes, script, *args, each=None):
    """Start so many processes that know of each other as those of torchrun do, and that torchrun
    does not watch. `each`: arguments for each one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    members = []
    for rank in range(processes):
        env = {"RANK": str(rank), **world} if processes > 1 else {}
        members.append(start(script, *args, *(each[rank] if each else ()), env=env))
    return members


def group(*args, **kwargs):
    """`start_group`; when all have ended, (stdout, stderr, status) of each."""
    members = start_group(*args, **kwargs)
    return [(*member.communicate(), member.returncode) for member in members]


def wait_for(stream, word):
    """Read lines until one holds `word`."""
    for line in stream:
        if word in line:
            return line
    raise AssertionError(f"it ended without {word!r}")


def ok(*args, **kwargs):
    """`script`, asserting success; its stdout."""
    result = script(*args, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@contextlib.contextmanager
def signals_kept():
    """Training takes the signals of its process over: give them back, or Ctrl-C is lost."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_signals():
    with signals_kept():
        yield


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    for process in STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.close()
    STARTED.clear()


def call(module, *flags):
    """Run the main() of a script in this process, with these flags: sooner than `script`."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        module.main()


UNSAFE = ("weights_only", "allow_pickle", "unsafe", "trust", "can still be loaded")


def refusal(capsys, monkeypatch, tmp_path):
    """call(script, args..., says=[...]): run a script, or its module, and look at what it says."""

    import common

    def call(script, *args, says, keeps=tmp_path):
        def content():
            files = [f for f in sorted(keeps.rglob("*")) if f.is_file() and f.name != ".lock"]
            return {f: f.read_bytes() for f in files if not f.is_symlink()}

        before = content()
        monkeypatch.setattr(sys, "argv", [getattr(script, "__file__", script), *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop, signals_kept():
            if isinstance(script, str):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            common.run(script.main)
        err = "\n".join(x for x in capsys.readouterr().err.splitlines() if "warning" not in x)
        assert stop.value.code == 2, err
        assert err.count("\n") == 0 and ": error: " in err and "Traceback" not in err, err
        assert err.isprintable() and not any(word in err for word in UNSAFE), err
        for word in says:
            assert str(word) in err, err
        assert before == {f: x for f, x in content().items() if f in before}
        return err

    return call


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    return refusal(capsys, monkeypatch, tmp_path)


def batch_indices(step, batch, images, seed) -> np.ndarray:
    """The images of a step, from whole epochs put end to end."""
    last = (step + 1) * batch // images
    epochs = [np.random.default_rng((seed, epoch)).permutation(images) for epoch in range(last + 1)]
    return np.concatenate(epochs)[step * batch : (step + 1) * batch]


def build(name, side=32, channels=4, classes=1000, qk_norm=True):
    import models

    meta = {"height": side, "channels": channels, "classes": range(classes)}
    return models.build_for({"model": name, "qk_norm": qk_norm}, meta)


def tiny(num_classes=10, seed=0, patch=8, size=16, name="SiT-Ti"):
    """A small SiT whose zero-initialised layers are filled, so that every path carries signal."""
    torch.manual_seed(seed)
    model = build(f"{name}/{patch}", size, 4, num_classes)
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model


def one_loss(model, projector, loss, rows):
    """A LossNetwork with one loss, or none that runs: (x_t, t, y, velocity, target) -> 2 losses."""
    from train_stage1 import LossNetwork

    class OneLoss(LossNetwork):
        def forward(self, x_t, t, y_input, velocity, target=None):
            return super().forward(x_t, t, y_input, velocity, [target])

    loss.module, loss.rows = projector, rows
    return OneLoss(model, [loss])


def write_folder(path, num=48, classes=10, shape=(4, 16, 16), seed=0, scale=1.0):
    """A latent folder of random numbers, from the documented format, not by the tested code."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(num, *shape))
    std = rng.uniform(0.05, 0.2, size=(num, *shape))
    np.save(path / "moments.npy", np.concatenate([mean, std], axis=1).astype(np.float16))
    np.save(path / "labels.npy", np.arange(num, dtype=np.int64) % classes)
    channels, height, width = shape
    meta = {"format": 1, "image_size": 32, "classes": [f"class {i}" for i in range(classes)]}
    meta.update(channels=channels, height=height, width=width, scale=scale, num_images=num)
    meta.update(vae={"path": "vae.pt", "identity": None})
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def write_checkpoint(path, model, name="SiT-Ti/8", step=7, shift=0.0):
    """A checkpoint from the documented format; raw weights are the average's plus `shift`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    qk_norm = isinstance(model.blocks[0].attn.q_norm, torch.nn.LayerNorm)
    args = {"model": name, "qk_norm": qk_norm, "label_drop": 0.1, "ema": 0.9, "seed": 0}
    args.update(ema_ramp=True, stage="align", align_weight=0.5, batch_size=8)
    meta = {"channels": 4, "height": model.input_size, "width": model.input_size, "scale": 1.0}
    meta.update(classes=[f"class {i}" for i in range(model.num_classes)], identity=None)
    meta.update(vae={"path": "vae.pt", "identity": None})
    ema = model.state_dict()
    raw = {key: value + shift for key, value in ema.items()}
    content = {"format": 2, "step": step, "args": args, "meta": meta, "model": raw, "ema": ema}
    torch.save(content, path)
    return path


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A real latent folder: 60 drawn shapes, a small VAE of 20 steps."""
    import vae_latents
    from experiments.demo import shapes
    from experiments.latents import small_vae

    folder = tmp_path_factory.mktemp("latents")
    shapes.write(folder / "images", 60, 32)
    small = "--size 32 --factor 2 --steps 20 --device cpu".split()
    call(small_vae, folder / "images", *small, "--out", folder / "vae.pt")
    flags = "--image-size 32 --batch-size 16 --device cpu".split()
    given = ["--images", folder / "images", "--vae", folder / "vae.pt"]
    call(vae_latents, *given, *flags, "--out", folder / "shapes")
    return folder / "shapes"


@pytest.fixture(scope="session")
def runs(latents, tmp_path_factory):
    """Runs on those latents: stage1 (8 steps), its teacher, stage2 (8 steps, guided for 5)."""
    import build_teacher
    import train_stage1
    import train_stage2

    out = tmp_path_factory.mktemp("runs")
    train = [*TRAIN, "--data", latents, "--steps", 8]
    call(train_stage1, *train, "--out", out / "stage1")
    call(build_teacher, "--ckpt", out / "stage1", "--out", out / "teacher")
    guide = ["--guide-steps", 5, "--teacher", out / "teacher/teacher.pt"]
    call(train_stage2, *train, *guide, "--out", out / "stage2")
    return out


def teacher_file(folder, model, s=30.0, **flags):
    """teacher.pt as build_teacher.py makes it of a checkpoint of `model`."""
    import build_teacher
    from models import SIZES

    size = next(key for key, size in SIZES.items() if size[:2] == (model.depth, model.width))
    write_checkpoint(folder / "whole.pt", model, f"SiT-{size}/{model.patch}")
    flags = [x for key, value in flags.items() for x in (f"--{key.replace('_', '-')}", value)]
    call(build_teacher, "--ckpt", folder / "whole.pt", "--out", folder, "--guide-scale", s, *flags)
    return folder / "teacher.pt"


def largest(a, b):
    """The largest absolute difference."""
    return (a - b).abs().max().item()


def picture(seed, side=32):
    """A flat colour, which is the seed's, with a little noise."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-30, 31, (side, side, 3))
    return Image.fromarray((rng.integers(40, 216, 3) + noise).clip(0, 255).astype(np.uint8))


def folder(root, names, each=3, ending="png"):
    """An image folder with these classes."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            picture(100 * label + i).save(root / name / f"{i}.{ending}")
    return root


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """The file of a tiny untrained VAE; with this scale its latents of `picture` have std 1."""
    from vae_latents import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    torch.save({"model": AutoencoderKL((8, 16), layers=1).state_dict(), "scale": 0.9}, path)
    return path


def encode(images, vae, out):
    import vae_latents

    call(vae_latents, "--images", images, "--vae", vae, "--out", out, *ENCODE)
    return out


@pytest.fixture(scope="session")
def numbered(tmp_path_factory, vae):
    """Classes named 0 to 11, which as text sort 0, 1, 10, 11, 2: latents, and a run of 2 steps."""
    import train_stage1

    root = tmp_path_factory.mktemp("numbered")
    images = folder(root / "images", [str(i) for i in range(12)], each=2)
    data = encode(images, vae, root / "data")
    call(train_stage1, *SMALL, "--data", data, "--out", root / "run", "--steps", 2)
    return types.SimpleNamespace(images=images, data=data, run=root / "run", vae=vae)


def changed_checkpoint(run, path, meta=(), **args):
    """A copy of the run's checkpoint whose latents or settings say something else."""
    import models

    saved = torch.load(models.checkpoints(run)[0], weights_only=True)
    saved["meta"].update(dict(meta))
    saved["args"].update(args)
    torch.save(saved, path)
    return path


def samples_in(out):
    with np.load(out / "samples.npz") as file:
        return dict(file)
