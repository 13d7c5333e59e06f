"""One table of all methods at the same settings: what each costs in all, and what it brings.

    python -m experiments.methods.table run vanilla --data data/cifar10 --out out/table
    python -m experiments.methods.table show --out out/table

`run ROW` trains a row of ROWS, makes samples of its checkpoints, and has both judges look at them;
a killed one goes on where it was. Rows that need a teacher need the row `teacher` before, or
--teacher FILE; `repa` needs the row `features`. `show` prints two tables in Markdown of what is
there, and with --page docs/methods.md it puts them into that page.

Total compute is in training steps of the vanilla network and has everything in it: projectors,
teachers, what a teacher or an encoder cost before (experiments/cifar10/report.py). "Guided" is at
the scale w, of those measured, at which that judge's distance is least. Cost to target: the total
compute at which a row's distance, or its share of the class asked for, without guidance and on
straight lines between checkpoints, reaches what vanilla has at its last step. Minutes are of one
core's work (user and system time) in training the row itself.

A method enters by a line in ROWS. What it adds to the network and not to a loss is its `cost`; if
its networks are no plain SiT, or are sampled in a way of their own, `sample` is the command that
does as experiments.cifar10.frontier does, with the same flags.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import models
from common import UserError, say, setting
from experiments.cifar10.frontier import append, read_figures
from experiments.cifar10.report import compute, line, network, read_run, spread, worth
from experiments.methods import attention_separation, ddae

ROOT = Path(__file__).resolve().parents[2]
COMMON = "--data {data} --batch-size {batch_size} --warmup {warmup} --ema {ema} --ema-ramp "
COMMON += "--lr {lr} --projector-dim {projector_dim} --log-every 100 --device {device} {compile} "
TRAIN = COMMON + "--model {model} --seed {seed} --steps {steps} --save-every {every} --keep 99 "
TRAIN += "--out {run}"
TEACHER = COMMON + "--model {teacher_model} --seed 2 --steps 6000 --save-every 3000 "
TEACHER += "--out {out}/teacher-run"
BUILD = "build_teacher --ckpt {out}/teacher-run --guide-scale 10 --student {model} "
BUILD += "--out {out}/teacher"
GUIDED = "--teacher {teacher} --guide-steps 1000000000 " + TRAIN
AS_RELEASED = "--t-min 0 --t-max 1 --guide-weight 0.15 "
FRONTIER = "experiments.cifar10.frontier"
MARKS = ("<!-- table show: begin -->", "<!-- table show: end -->")  # in docs/methods.md


@dataclass
class Row:
    title: str  # in the table
    train: str  # the command after `python -m`; {...} are settings, and `run` is the run's folder
    longer: int = 1  # it trains so many times as long
    needs: str = ""  # a file that must be there before
    made_by: str = ""  # and the row that makes it
    sample: str = FRONTIER  # the command that makes samples and judges them
    cost: Callable = lambda model: 0.0  # of what is no loss, as a share of a training step
    then: str = ""  # a command after the training, once; such a row only helps others
    of: str = ""  # the row whose network it samples in another way


METHODS = "experiments.methods."
NEEDS = {"needs": "{teacher}", "made_by": "teacher"}
REPA_NEEDS = {"needs": "{data}/cnn.npy", "made_by": "features"}
ROWS = {
    "teacher": Row("", f"train_stage1 {TEACHER}", then=BUILD),
    "features": Row("", "", then=f"{METHODS}repa_features --data {{data}} --model {{model}}"),
    "vanilla": Row("vanilla SiT", f"train_stage1 --align-weight 0 {TRAIN}", longer=2),
    "stage1": Row("stage 1", f"train_stage1 {TRAIN}"),
    "stage2": Row("stage 2, as described", f"train_stage2 {GUIDED}", **NEEDS),
    "stage2-released": Row("stage 2, as released", f"train_stage2 {AS_RELEASED}{GUIDED}", **NEEDS),
    "internal": Row("Internal Guidance, by CFG", f"{METHODS}internal_guidance {TRAIN}"),
    "internal-own": Row(
        "Internal Guidance, by its own",
        f"{METHODS}internal_guidance {TRAIN}",
        sample=f"{METHODS}internal_sampled",
        of="internal",
    ),
    "stage2-internal": Row(
        "stage 2 and Internal Guidance", f"{METHODS}stage2_internal {GUIDED}", **NEEDS
    ),
    "vae": Row("SRA 2 (VAE-REPA)", f"{METHODS}vae_repa {TRAIN}"),
    "sra": Row("SRA", f"{METHODS}sra {TRAIN}"),
    "ddae": Row(
        "DDAE++, guessed",
        f"{METHODS}ddae train --align-weight 0 {TRAIN}",
        sample=f"{METHODS}ddae frontier",
        cost=ddae.extra_cost,
    ),
    "separated": Row(
        "Attention Separation",
        f"{METHODS}attention_separation {TRAIN}",
        cost=attention_separation.extra_cost,
    ),
    "stage2-separated": Row(
        "stage 2 and Attention Separation",
        f"{METHODS}attention_separation {GUIDED}",
        cost=attention_separation.extra_cost,
        **NEEDS,
    ),
    "measured": Row(
        "stage 2, released by measurement",
        f"{METHODS}measured_release --release-over {{steps}} {GUIDED}",
        **NEEDS,
    ),
    "repa": Row(
        "REPA, a CNN that saw the labels",
        f"{METHODS}repa --features {{data}}/cnn.npy {TRAIN}",
        **REPA_NEEDS,
    ),
}


@dataclass
class Settings:
    row: str = setting(None, positional=True)  # of ROWS; `show` takes none
    data: str = "data/cifar10"  # latent folder
    out: str = "out/table"  # folder of all runs, figures.jsonl and runs.jsonl
    teacher: str | None = None  # teacher.pt (default: the row teacher's)
    model: str = "SiT-Ti/4"  # the network
    teacher_model: str = "SiT-N/4"  # the network of the row teacher
    steps: int = 3000  # training steps; vanilla trains twice as long
    every: int = 1000  # steps between the checkpoints that are judged
    batch_size: int = 32  # images in a step
    lr: float = setting(2e-3, above=0)  # AdamW's rate
    warmup: int = 100  # steps of linear warm-up
    ema: float = setting(0.998, at_least=0, below=1)  # decay of the averaged weights
    projector_dim: int = 256  # hidden width of the projectors
    seed: int = setting(1, at_least=0)  # of the run; the teacher's is 2
    scales: str = "1,2"  # guidance scales w at the last step; the first is 1
    num: int = setting(2000, at_least=2)  # samples, by eight steps of Heun
    judge: str = "out/cifar10/classifier.pt"  # files of judge.py, with commas
    outside: str = "out/outside.pt"  # files of outside.py, with commas
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one
    compile: bool = False  # torch.compile the networks
    page: str | None = None  # `show` writes its tables into this page, too, between its marks


# ---- Running a row


def words(command, args) -> list[str]:
    """A command of ROWS with the settings filled in."""
    known = {**asdict(args), "compile": "--compile" if args.compile else ""}
    known["run"] = run_of(args, args.row, args.seed)
    known["teacher"] = args.teacher or f"{args.out}/teacher/teacher.pt"
    filled = [word.format(**known) for word in command.split()]
    return [word for word in filled if word]


def run_of(args, row, seed) -> Path:
    return Path(args.out) / f"{ROWS[row].of or row}-{seed}"


def python(command):
    """Run `python -m command`; a failed one has printed its reason and ends this one, too."""
    done = subprocess.run([sys.executable, "-m", *command])
    if done.returncode:
        sys.exit(done.returncode)


def newest_step(run) -> int:
    return int(next((path.stem[5:] for path in models.checkpoints(run)), 0))


def commit() -> str:
    """The revision of this code, with + if files have changed since; empty outside of git."""
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def run_row(args):
    row = ROWS[args.row]
    if row.needs and not Path(words(row.needs, args)[0]).exists():
        remedy = f"run the row {row.made_by} first"
        raise UserError(f"{words(row.needs, args)[0]}: is not there; {remedy}")
    args.steps *= row.longer
    run = run_of(args, args.row, args.seed)
    before, start = os.times(), newest_step(run)
    if row.train:
        python(words(row.train, args))
    if row.then:
        python(words(row.then, args))
        return
    after, end = os.times(), newest_step(run)
    if end > start:
        user, system = after.children_user - before.children_user, after.children_system
        seconds = user + system - before.children_system
        about = {"row": row.of or args.row, "seed": args.seed, "steps": end - start}
        about.update(cpu_seconds=round(seconds, 1), commit=commit())
        append(f"{args.out}/runs.jsonl", about)
    for path in reversed(models.checkpoints(run)):
        step = int(path.stem[5:])
        guided = step % (args.steps // row.longer) == 0  # those that the guided columns show
        scales = args.scales if guided else "1"
        judges = ["--judge", args.judge, "--outside", args.outside]
        flags = ["--scales", scales, "--num", str(args.num), "--device", args.device, *judges]
        flags += ["--out", f"{args.out}/figures.jsonl", *(["--compile"] if args.compile else [])]
        python([*row.sample.split(), f"{args.row}-{args.seed}={path}", *flags])


# ---- The tables


def gather(args) -> dict:
    """{row: {step: {seed: {w: figures}}}}, in the order of ROWS."""
    found = {}
    for figures in read_figures(f"{args.out}/figures.jsonl"):
        name, _, seed = figures["name"].rpartition("-")
        seeds = found.setdefault(name, {}).setdefault(figures["step"], {})
        seeds.setdefault(int(seed), {})[figures["w"]] = figures
    if not found:
        raise UserError(f"{args.out}/figures.jsonl: holds no figures yet; run a row first")
    return {row: dict(sorted(found[row].items())) for row in ROWS if row in found}


def total_compute(args, row, step, seeds) -> float:
    """In steps of the vanilla network, mean over the seeds."""
    totals = []
    for seed in seeds:
        run = run_of(args, row, seed)
        own, meta, _ = read_run(run)
        totals.append(
            compute(run, step, own.model) + step * ROWS[row].cost(network(own.model, meta))
        )
    return statistics.mean(totals)


def guided(scales: dict, judge) -> dict | None:
    """The figures at the w > 1 at which this judge's distance is least."""
    known = [figures for w, figures in scales.items() if w > 1]
    return min(known, key=lambda figures: figures[judge]["distance"], default=None)


def cell(figures: list, judge) -> str:
    """Distance and class of some seeds, and their w if it is not 1."""
    distance = spread([f[judge]["distance"] for f in figures], 1, 1)
    share = spread([f[judge]["class"] for f in figures], 1, 100)
    scales = sorted({f["w"] for f in figures})
    told = "" if scales == [1] else f" (w = {', '.join(f'{w:g}' for w in scales)})"
    return f"{distance}; {share} %{told}"


def work(args, row, step, seeds) -> list[str]:
    """Minutes of a core, and the commits, of training a row to this step."""
    name = ROWS[row].of or row
    known = [about for about in read_figures(f"{args.out}/runs.jsonl") if about["row"] == name]
    known = [about for about in known if about["seed"] in seeds]
    if not known:
        return ["", ""]
    rate = sum(about["cpu_seconds"] for about in known) / sum(about["steps"] for about in known)
    commits = dict.fromkeys(about["commit"] for about in known)
    return [f"{rate * step / 60:.0f}", ", ".join(commits)]


def comparison(args, found) -> list[str]:
    judges = judges_of(found)
    heads = [f"{judge}, {how}" for judge in judges for how in ("w = 1", "guided")]
    heads = ["", "steps", "total compute", *heads, "recall", "minutes", "commit", "seeds"]
    lines = [line(*heads), line(*["---"] * len(heads))]
    for row, steps in found.items():
        for step, seeds in steps.items():
            best = [[guided(scales, judge) for scales in seeds.values()] for judge in judges]
            if not all(map(all, best)):
                continue  # a step on the way: the next table has it
            plain = [scales[1.0] for scales in seeds.values()]
            cells = [ROWS[row].title, f"{step:,}", f"{total_compute(args, row, step, seeds):,.0f}"]
            for judge, figures in zip(judges, best, strict=True):
                cells += [cell(plain, judge), cell(figures, judge)]
            recall = [spread([f[judge]["recall"] for f in plain], 3, 1) for judge in judges]
            who = ", ".join(map(str, sorted(seeds)))
            lines.append(line(*cells, "; ".join(recall), *work(args, row, step, seeds), who))
    return lines


def judges_of(found) -> list[str]:
    """The judges' names, from any line of figures."""
    steps = next(iter(found.values()))
    seeds = next(iter(steps.values()))
    figures = next(iter(next(iter(seeds.values())).values()))
    return [key for key, value in figures.items() if isinstance(value, dict)]


def costs_to_target(args, found) -> list[str]:
    judges = judges_of(found)
    wanted = [(judge, what) for judge in judges for what in ("distance", "class")]
    curves = {}  # {row: {(judge, what): [(total compute, mean over the seeds), ...]}}
    for row, steps in found.items():
        curves[row] = {key: [] for key in wanted}
        for step, seeds in steps.items():
            total = round(total_compute(args, row, step, seeds))
            for judge, what in wanted:
                values = [scales[1.0][judge][what] for scales in seeds.values()]
                curves[row][judge, what].append((total, statistics.mean(values)))
    if "vanilla" not in curves:
        return ["The cost to target needs the row vanilla."]
    lines = [line("cost to target", *(f"{judge}, {what}" for judge, what in wanted))]
    lines.append(line(*["---"] * (1 + len(wanted))))
    targets = {key: curve[-1][1] for key, curve in curves["vanilla"].items()}
    shown = [f"{target:.3g}" for target in targets.values()]
    lines.append(line("the target", *shown))
    for row, known in curves.items():
        # report.worth takes FD-CNN as a name for what is better when it is lower
        kinds = {"distance": "FD-CNN", "class": "agreement"}
        cells = [worth(known[key], targets[key], kinds[key[1]]) for key in wanted]
        lines.append(line(ROWS[row].title, *cells))
    return lines


def write_into(page, text):
    """Put `text` between the two marks of a page, in place of what is there."""
    old = Path(page).read_text()
    begin, end = MARKS
    if not -1 < old.find(begin) < old.find(end):
        raise UserError(f"{page}: has no place for a table; write {begin} and {end} in lines there")
    head, tail = old[: old.index(begin)], old[old.index(end) :]
    with common.atomic_write(page) as file:
        file.write(f"{head}{begin}\n\n{text}\n\n{tail}".encode())


def main():
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if verb not in ("run", "show"):
        raise UserError("table.py: give `run ROW` or `show`")
    args = common.parse_settings(Settings, __doc__)
    if verb == "run":
        if args.row not in ROWS:
            raise UserError(f"table.py, row {args.row}: is none of {', '.join(ROWS)}")
        run_row(args)
    else:
        found = gather(args)
        lines = [*comparison(args, found), "", *costs_to_target(args, found)]
        for text in lines:
            say(text)
        if args.page:
            write_into(args.page, "\n".join(lines))


if __name__ == "__main__":
    common.run(main)
