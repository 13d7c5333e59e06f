"""What every script shares: settings, messages, files, processes, long work. No method here."""

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import os
import re
import sys
import time
import traceback
import zipfile
from dataclasses import field, fields
from operator import ge, gt, le, lt
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
IS_FIRST = os.environ.get("RANK") == "0" or not {*TORCHRUN} <= os.environ.keys()

# ---- Settings: a dataclass. Each field is a flag, and the comment behind it is its --help
RULES = {"at_least": ge, "above": gt, "below": lt, "at_most": le}  # what holds a number


def setting(default, **rules):
    """A setting that is checked by RULES or `choices`; `positional`: without a flag. `change`: a
    continued run may change it ("free"), or may and prints so ("printed"). Others never may."""
    return field(default=default, metadata=rules)


def parse_settings(Settings: type, doc: str):
    """The command line as an object of the dataclass `Settings`; UserError for a bad value."""
    source = "".join(map(inspect.getsource, reversed(Settings.__mro__[:-1])))  # bases first
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = refuse
    for f in fields(Settings):
        default = "" if f.default in (None, "") else f" (default: {f.default})"
        help = (comments.get(f.name, "") + default).replace("%", "%%")
        kind = getattr(f.type, "__args__", (f.type,))[0]  # `int | None` is an int
        options = {"type": kind, "choices": f.metadata.get("choices")}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        names, options["dest"] = [flag(f.name)], f.name
        if "positional" in f.metadata:
            names, options["nargs"] = [], "?" if f.default is None else None
        parser.add_argument(*names, default=f.default, help=help, **options)
    settings = Settings(**vars(parser.parse_args()))
    for f in fields(Settings):
        value, broken = getattr(settings, f.name), ""
        whole = {"at_least": 1} if type(value) is int else {}  # whole numbers count something
        for rule, limit in {**whole, **f.metadata}.items():
            if rule in RULES and value is not None and not RULES[rule](value, limit):
                broken = f"{rule.replace('_', ' ')} {limit}"
        if isinstance(value, float) and not np.isfinite(value):
            broken = "a finite number"
        if broken or (value == "" and f.default != ""):
            refuse(f"{flag(f.name)} {value}".rstrip() + f": must be {broken or 'a word'}")
    return settings


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")  # from_ is --from


def refuse(message):
    raise UserError(f"{message} (--help lists the flags)")


class UserError(Exception):
    """A user's mistake. `run` prints it as one line on stderr and exits with status 2."""


def run(main):
    """Call main(). A UserError or OSError is one line and status 2, Ctrl-C status 130."""
    status = 0
    try:
        main()
    except SystemExit as stop:  # of --help, or an end that all processes agreed on
        status = stop.code
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            error = UserError(f"torch.compile failed; use --no-compile ({error})"[:300])
        status = 2 if isinstance(error, (UserError, OSError)) else 1
        if status == 2 and not IS_FIRST:
            time.sleep(3)  # the first process reports, then torchrun ends the others
        if status == 2:
            say(f"{Path(sys.argv[0]).name}: error: {error}", sys.stderr, rank_0_alone=False)
        else:
            traceback.print_exc()
    if dist.is_initialized():
        if status in (1, 2, 130):
            os._exit(status)  # at once: its peers may wait for it in a collective
        dist.destroy_process_group()
        time.sleep(0.5)  # in which gloo's threads end; Python's own end would abort them
    sys.exit(status)


def say(text, stream=None, rank_0_alone=True):
    """Print one line. What the terminal cannot show, and a name may hold, is escaped."""
    stream = stream or sys.stdout  # or None: a daemon has closed it
    if stream is None or (rank_0_alone and not IS_FIRST):
        return
    coding = getattr(stream, "encoding", None) or "utf-8"
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    try:
        print(line.encode(coding, "backslashreplace").decode(coding), file=stream, flush=True)
    except OSError:  # a closed pipe or a full disk does not stop a run: print no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text):
    say(f"warning: {text}", sys.stderr)


@contextlib.contextmanager
def reading(path, problem):
    """Turn whatever goes wrong while a user's file is read into "PATH: problem (reason)"; so
    `problem` has to say what the file is not, and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) not in (None, 2, 21):  # not missing, and no folder
            problem = "cannot be read"  # which says nothing about the file itself
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "Weights only" in reason or "allow_pickle" in reason:  # their advice is unsafe
            reason = " ".join(["not plain data:", *re.findall(r"GLOBAL ([^ ]+)", str(error))])
        if Path(path).is_file() and not zipfile.is_zipfile(path):
            reason += f"; begins with {open(path, 'rb').read(30)!r}"
        if "b'version https://git-lfs" in reason:
            problem += "; it is a Git LFS pointer: run git lfs pull to fetch the file itself"
        raise UserError(f"{path}: {problem} ({reason})") from error


def load_file(path, format=None) -> dict:
    """torch.load of tensors and plain Python, never of code, after checksums; in `reading`. The
    tensors stay mapped to the file: copy what must outlive it."""
    zipped = zipfile.is_zipfile(path)
    if zipped and (bad := zipfile.ZipFile(path).testzip()):  # torch checks no mapped file
        raise ValueError(f"the checksum of {bad} is wrong")
    saved = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))
    if format and saved.get("format") != format:
        raise ValueError(f"its format is {saved.get('format')}, not {format}")
    return saved


@contextlib.contextmanager
def atomic_write(path):
    """A file for bytes. `path` is the old file, or none, until the new one is whole."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        fix = f"make room, or take a local disk ({error})"
        raise UserError(f"{path}: could not be written, nothing is lost; {fix}") from error


def lock(folder):
    """Make `folder`, and keep other runs out while the first process's returned file lives."""
    if not IS_FIRST:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{folder}: another run is using it; choose another --out") from error
    except OSError as error:
        warn(f"{folder}: cannot be locked ({error}); start no second run")
    return file


def setup(device="auto") -> tuple[torch.device, int, int]:
    """(device, rank, world size), after joining torchrun's processes if there are any."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    usable = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device not in usable:
        raise UserError(f"--device {device}: must be one of {', '.join(usable)}")
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do by default
    found = [f"{name}={os.environ[name]}" for name in TORCHRUN if name in os.environ]
    if len(found) < len(TORCHRUN):
        if found:
            warn(f"{' '.join(found)}: the rest of {TORCHRUN} is not set; it runs alone")
        elif "SLURM_PROCID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
            warn("Slurm's tasks do not know of each other; use torchrun (docs/jobs.md)")
        return torch.device(device), 0, 1
    with reading(" ".join(found), "the others are not found; unset these, or see docs/jobs.md"):
        if not dist.is_initialized():  # gloo carries CPU tensors, NCCL CUDA's
            dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    return torch.device(device), dist.get_rank(), dist.get_world_size()


def gather(item=None) -> list:
    """The `item` of every process, in a list by rank. Without an item: wait for all of them."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def fingerprint(*items) -> str:
    """sha256 of tensors, arrays and plain values: the same content has the same hash."""
    digest = hashlib.sha256()
    for item in items:
        item = item.cpu().numpy() if isinstance(item, torch.Tensor) else item
        digest.update(item.tobytes() if isinstance(item, np.ndarray) else repr(item).encode())
    return digest.hexdigest()


def progress(what, items, world=1):
    """The `items`, one by one; prints how far it is: first, last and every 5 seconds."""
    start, shown = time.time(), 0.0
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.time()) > shown + 5 or done == len(items):
            shown, rate = now, done / (now - start + 1e-9)
            far = f"{what} {done * world}/{len(items) * world}"
            say(f"{far}  {rate * world:.1f}/s  {(len(items) - done) / rate:.0f} s left")


def shared_array(path, shape, dtype, rank) -> np.ndarray:
    """An array on disk, zeros at first, that processes fill and a killed run goes on with."""
    if rank == 0 and not path.exists():
        with atomic_write(path) as file:  # a full disk is an error here, no crash later
            np.lib.format.open_memmap(file.name, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
    gather()  # the others wait
    with reading(path, "is damaged; remove it and run the same command again"):
        return np.load(path, mmap_mode="r+")


def chunks_to_do(done, size, rank, world) -> list[np.ndarray]:
    """This process's chunks of `size` rows; the chunks are the same whoever works on them."""
    chunks = np.split(np.arange(len(done)), range(size, len(done), size))
    return [rows for rows in chunks[rank::world] if not done[rows].all()]
