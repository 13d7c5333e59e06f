"""What surrounds a run: make, Git on Windows, a notebook's streams, a missing compiler."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TRAIN, script, write_folder

import common


def test_make_begins_an_installation_again_that_has_failed(tmp_path):
    """A stub of Python whose venv fails once, as without python3-venv, then works."""
    for name in ("Makefile", "requirements.txt", "requirements-demo.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stub = tmp_path / "python-stub"
    stub.write_text(
        "#!/bin/sh\n"
        "mkdir -p .venv/bin\n"  # which is what a failed venv leaves behind
        "[ -e second ] || { touch second; exit 1; }\n"
        "printf '#!/bin/sh\\necho \"$@\" >> installed\\n' > .venv/bin/python\n"
        "chmod +x .venv/bin/python\n"
    )
    stub.chmod(0o755)
    make = ["make", ".venv/demo", f"PYTHON={stub}"]
    assert subprocess.run(make, cwd=tmp_path, capture_output=True).returncode != 0
    assert not (tmp_path / ".venv/run").exists()
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = (tmp_path / "installed").read_text()
    assert "requirements.txt" in installed and "requirements-demo.txt" in installed


def test_git_keeps_unix_line_ends_where_a_shell_reads():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    read = [name for name in files.split() if name.endswith(".sh")] + ["Makefile", ".ci/run"]
    attributes = subprocess.run(
        ["git", "check-attr", "eol", *read], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(attributes) == len(read) > 8
    assert all(line.endswith("eol: lf") for line in attributes)


class Cell:
    """What a notebook has in the place of a terminal: it takes text and knows nothing else."""

    def __init__(self, encoding=None):
        self.text = ""
        if encoding:
            self.encoding = encoding

    def write(self, text):
        if hasattr(self, "encoding"):
            text.encode(self.encoding)  # or a UnicodeEncodeError, as a terminal's
        self.text += text

    def flush(self):
        pass


def test_a_script_prints_into_a_notebooks_cell():
    cell = Cell()
    with contextlib.redirect_stdout(cell), pytest.raises(SystemExit) as stop:
        common.run(lambda: common.say("done"))
    assert stop.value.code == 0 and cell.text == "done\n"


def test_what_the_terminal_lacks_is_escaped():
    for encoding, shown in (("ascii", "caf\\xe9 \\u2713"), ("latin-1", "café \\u2713")):
        cell = Cell(encoding)
        common.say("café ✓", cell)
        assert cell.text == shown + "\n"
    cell = Cell("utf-8")
    common.say("café ✓ \udcff\x1b[31m", cell)  # a file name of other bytes, and a colour
    assert cell.text == "café ✓ \\udcff\\x1b[31m\n"


def test_nothing_is_printed_where_a_daemon_has_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    common.say("to nobody")


@pytest.mark.slow
def test_a_missing_compiler_is_one_line_that_names_the_flag(tmp_path):
    data = write_folder(tmp_path / "data")
    flags = [*TRAIN, "--steps", 1, "--data", data, "--out", tmp_path / "run", "--compile"]
    bare = {"PATH": os.path.dirname(sys.executable), "CXX": "/nowhere/c++"}
    fresh = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = script("train_stage1.py", *flags, env={**bare, **fresh})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "--no-compile" in done.stderr and "torch.compile failed" in done.stderr
