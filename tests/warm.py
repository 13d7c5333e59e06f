"""Processes that begin where Python has imported torch: `Process(SCRIPT, flags...)` is a Popen.

A Python that trains spends 4.5 CPU seconds on imports, and each process spends them again. So one
process imports what is not the project's and waits; what a test starts is a fork of it, which runs
the script as `python SCRIPT` does. Signals, streams, the exit status and the interpreter's end are
Python's own, and every file of the project is read by the fork.
"""

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# ---- in the test's process


class Process:
    """What tests use of subprocess.Popen: stdout and stderr are pipes of text, and the process has
    a session of its own. `closed`: streams that it begins without, such as [1]; `ignored`: signals
    that it begins deaf to, as nohup does it."""

    def __init__(self, *command, env=None, closed=(), ignored=()):
        self.command = [str(word) for word in command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        request = {"command": self.command, "env": environment}
        request.update(closed=[*closed], ignored=[*ignored])
        reading, writing = zip(os.pipe(), os.pipe(), strict=True)
        self.pid, self.returncode = ask(request, writing), None
        for end in writing:
            os.close(end)
        self.stdout, self.stderr = (open(end, errors="replace") for end in reading)

    def poll(self):
        if self.returncode is None:
            self.returncode = ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout=600):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.command, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=600):
        """(stdout, stderr) to the end; a process that hangs is killed after `timeout` seconds."""
        timer, errors = threading.Timer(timeout, self.kill), []
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()))
        timer.start()
        reader.start()
        out = "" if self.stdout.closed else self.stdout.read()
        reader.join()
        timer.cancel()
        self.wait()
        return out, errors[0]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def close(self):
        self.wait()
        for stream in (self.stdout, self.stderr):
            stream.close()

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


CHANNEL = []


def ask(request, streams=()):
    """What the waiting process answers; the first request starts it."""
    if not CHANNEL:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=env, start_new_session=True
        )
        theirs.close()
        CHANNEL.append(ours)
        atexit.register(lambda: (ours.close(), server.wait()))
    socket.send_fds(CHANNEL[0], [json.dumps(request).encode()], streams)
    answer = CHANNEL[0].recv(1000)
    assert answer, "the process that waits with torch has ended"
    return json.loads(answer)


# ---- in the process that waits, and in its forks


def serve(channel):
    """Answer until the test's process is gone; in a fork, return what it is to run."""
    import scipy.linalg  # noqa: F401
    import torch._dynamo  # noqa: F401, which the first step of an optimizer would import
    import torchvision  # noqa: F401

    while True:
        message, streams, *_ = socket.recv_fds(channel, 1_000_000, 2)
        if not message:
            return None
        request = json.loads(message)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            channel.send(json.dumps(answer).encode())
        elif os.fork() == 0:
            os.setsid()
            channel.send(json.dumps(os.getpid()).encode())
            channel.close()
            become(request, streams)
            return request["command"]
        for stream in streams:
            os.close(stream)


def become(request, streams):
    """Take over the streams, the signals, the environment and the folder of a request."""
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = open(1, "w", closefd=False)  # which finds out what the new stream is
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for number in request["closed"]:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    tempfile.tempdir = None  # TMPDIR may be another one
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(ROOT)


def run(command):
    """`python SCRIPT flags...` or `python -m MODULE flags...`"""
    if command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], str(ROOT)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, os.path.dirname(command[0])
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    if command := serve(socket.socket(fileno=int(sys.argv[1]))):
        run(command)
