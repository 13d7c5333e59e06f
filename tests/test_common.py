"""common.py: files, streams, flags, and what torchrun leaves in the environment."""

import dataclasses
import errno
import os
import runpy
import socket
import sys

import pytest
import torch
import torch.distributed.run
from conftest import (
    EULER,
    ROOT,
    SMALL,
    call,
    encode,
    folder,
    start,
)

import common
import models
import sample
import train_stage1
import train_stage2
import vae_latents
from common import UserError

# ---- flags


@pytest.mark.parametrize("script", [vae_latents, train_stage1, train_stage2, sample])
def test_torchrun_leaves_each_flag_to_its_script(script):
    """It looks for abbreviations of its own flags behind the script's name, too, as --num was."""
    parser = torch.distributed.run.get_args_parser()
    theirs = [option for action in parser._actions for option in action.option_strings]
    for field in dataclasses.fields(script.Settings):
        ours = common.flag(field.name)
        assert not [option for option in theirs if option.startswith(ours)]


@pytest.mark.parametrize("name", ["vae_latents", "train_stage1", "train_stage2", "sample", "fid"])
def test_help_is_not_an_error(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0 and "default" in capsys.readouterr().out


# ---- the process's surroundings


def test_variables_of_torchrun_that_are_left_over(numbered, refused, monkeypatch, tmp_path):
    """The port is taken: one line names them, whatever torch says."""
    train = [*SMALL, "--data", numbered.data, "--out", tmp_path / "run", "--steps", 2]
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        left = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in left.items():
            monkeypatch.setenv(name, value)
        refused(train_stage1, *train, says=[f"{name}={value}" for name, value in left.items()])
    monkeypatch.setenv("MASTER_PORT", "many")
    refused(train_stage1, *train, says=["MASTER_PORT=many"])
    assert not (tmp_path / "run").exists()


ALONE = [{"RANK": "1"}, {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "2"}]


@pytest.mark.parametrize("left", ALONE, ids=str)
def test_a_part_of_torchruns_variables_is_said(left, numbered, monkeypatch, tmp_path, capsys):
    """RANK=1 alone: the run goes on as one process, is heard, and says what it leaves aside."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    train = [*SMALL, "--data", numbered.data, "--out", tmp_path / "run", "--steps", 2]
    call(train_stage1, *train)
    said = capsys.readouterr()
    assert "done at step 2" in said.out and said.err.startswith("warning: ")
    assert all(f"{name}={value}" in said.err for name, value in left.items())


STREAMS = {"stdout": ("", "one class"), "stderr": ("done at step 2", ""), "all": ("", "")}


@pytest.mark.slow
@pytest.mark.parametrize("streams", STREAMS)
def test_a_stream_that_is_closed_is_the_one_that_is_given_up(streams, vae, tmp_path):
    """As a daemon starts it: the run goes on, and what is printed goes into no other file."""
    data = encode(folder(tmp_path / "images", ["faces"], each=8), vae, tmp_path / "data")
    train = [*SMALL, "--data", data, "--out", tmp_path / "run", "--steps", 2]
    closed = {"stdout": [1], "stderr": [2], "all": [0, 1, 2]}[streams]
    process = start(ROOT / "train_stage1.py", *train, closed=closed)
    said = process.communicate()
    assert process.returncode == 0, said
    for wanted, text in zip(STREAMS[streams], said, strict=True):
        assert wanted in text and bool(wanted) == bool(text)
    assert (tmp_path / "run/ckpt-0000002.pt").exists()
    models.load_checkpoint(tmp_path / "run")
    for file in (tmp_path / "run").iterdir():
        assert b"one class" not in file.read_bytes() and b"done at" not in file.read_bytes()


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_of_two_streams_the_one_that_is_full_is_given_up(full, vae, monkeypatch, tmp_path):
    """`fid.py A B 2>/dev/full` prints its result; `train_stage1.py >/dev/full` trains."""
    data = encode(folder(tmp_path / "images", ["faces"], each=8), vae, tmp_path / "data")
    train = [*SMALL, "--data", data, "--out", tmp_path / "run", "--steps", 2]
    with open(tmp_path / "whole", "w") as whole, open("/dev/full", "w") as nothing:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, nothing if name == full else whole)
        call(train_stage1, *train)
        common.warn("the last one")
    said = (tmp_path / "whole").read_text()
    assert ("done at step 2" if full == "stderr" else "one class") in said
    assert ("the last one" in said) == (full == "stdout")
    assert (tmp_path / "run/ckpt-0000002.pt").exists()


def test_names_that_would_steer_a_terminal_are_one_printable_line(numbered, refused, tmp_path):
    name = tmp_path / "a\nerror: \x1b[31mred\x07 \udcff.pt"
    err = refused(sample, "--ckpt", name, *EULER, "--out", tmp_path / "out", says=["\\n", "\\x1b"])
    assert err.isprintable()


# ---- files


@pytest.mark.slow
def test_a_file_is_the_old_one_until_it_is_whole(tmp_path, monkeypatch):
    """What is written is on the disk before it has its name; a fault leaves nothing of it."""
    path, order = tmp_path / "deep/file", []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(common.os, name, lambda *a, n=name, f=real: (order.append(n), f(*a)))
    with common.atomic_write(path) as file:
        file.write(b"first")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"first" and order == ["fsync", "replace"]
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises((UserError, KeyboardInterrupt)), common.atomic_write(path) as file:
            file.write(b"sec")
            file.flush()
            assert path.read_bytes() == b"first"
            raise error
        assert path.read_bytes() == b"first"
    with common.atomic_write(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"second" and os.listdir(path.parent) == ["file"]


# ---- the end of a process


@pytest.mark.slow
def test_a_process_that_fails_alone_waits_for_nobody(monkeypatch):
    """It leaves at once, with its status, and does not tear the group down first."""

    class Left(BaseException):
        pass

    statuses = []

    def leave(status):
        statuses.append(status)
        raise Left

    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common.dist, "destroy_process_group", lambda: pytest.fail("it waited"))
    monkeypatch.setattr(common.os, "_exit", leave)
    for error in (ValueError("boom"), UserError("a mistake"), KeyboardInterrupt()):

        def main(error=error):
            raise error

        with pytest.raises(Left):
            common.run(main)
    assert statuses == [1, 2, 130]
