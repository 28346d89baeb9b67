"""Watches over the process that runs a student's code: time, deaths, what it leaves behind.

Where the system can fork, a server (worker.py --serve) has imported torch once and forks for every
submission; elsewhere each submission is a process of its own. Both are watched in the same way: the
process writes a line when a test starts and when it is done; a test that takes too long, or ends
the process, has failed, and a new process goes on with the next. After STRIKES such tests the rest
is not run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from minipeft.labs.engine.lab import PACKAGE

STRIKES = 3
IMPORT_SECONDS = 30.0
PATIENCE = 6  # a test may wait so many times longer than it may compute
POLL = 0.01  # seconds between two looks

OUT_OF_TIME = "took longer than {:g} seconds"
DIED = "the process ended in the middle of it"
NOT_RUN = f"not run, because {STRIKES} tests ran out of time or ended the process"


def environment(preload=()):
    """The variables of a process that runs a student's code."""
    root = str(PACKAGE.parent)
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": root,
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "MINIPEFT_FAST_PATH": "off",  # a twin must not stand in for what the student writes
        "MINIPEFT_LAB_PRELOAD": " ".join(preload),
    }


class Spawner:
    """Starts a new Python for every request: works everywhere, two seconds each."""

    def __init__(self, preload=()):
        self.preload, self.running = preload, {}

    def start(self, request):
        """Start it; returns its process id."""
        written = Path(request["report"] + ".request")
        written.write_text(json.dumps(request))
        group = {"start_new_session": True} if os.name == "posix" else {}
        process = subprocess.Popen(
            [sys.executable, "-m", "minipeft.labs.engine.worker", str(written)],
            env=environment(self.preload) | {"PYTHONPATH": request["tree"]},
            cwd=request["tree"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **group,
        )
        self.running[process.pid] = process
        return process.pid

    def ended(self, pid):
        """Whether it is over."""
        return self.running[pid].poll() is not None

    def close(self):
        """Nothing is kept between requests."""


class ForkServer:
    """Starts requests as forks of one process that has imported torch."""

    def __init__(self, preload=()):
        self.preload, self.server = preload, None

    def start(self, request):
        """Start it; returns its process id. A server that was killed is started again."""
        try:
            return self.ask({"run": request})["pid"]
        except (OSError, ValueError):
            self.close()
            return self.ask({"run": request})["pid"]

    def ended(self, pid):
        """Whether it is over."""
        try:
            return self.ask({"poll": pid})["code"] is not None
        except (OSError, ValueError):
            return True

    def ask(self, message):
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "minipeft.labs.engine.worker", "--serve"],
                env=environment(self.preload),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the grader
            )
        self.server.stdin.write(json.dumps(message) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self):
        """End the server."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            with contextlib.suppress(OSError):
                self.server.stdin.close()
            self.server.stdout.close()
        self.server = None


def starter(preload=()):
    """What fits this machine. On a Mac forks of a process that has used frameworks are unsafe."""
    forks = hasattr(os, "fork") and sys.platform != "darwin"
    return ForkServer(preload) if forks else Spawner(preload)


def kill(pid, over):
    """End all that a process has started in its group, and it; elsewhere than on POSIX its tree.

    over: it has ended already, so that its number may be another's.
    """
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if not over:  # it may not have had the time to make a group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    else:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(pid)], capture_output=True)


def run_all(start, request, jobs, seconds, tell=None):
    """{id: {status, message, printed, empty}} of every job, whatever happens.

    start: a Spawner or ForkServer. jobs: [[id, ...]]. seconds: of a test. tell: called with (id,
    result) as each is known.
    """
    results, strikes = {}, 0

    def note(id, status, message, printed="", empty=""):
        result = {"status": status, "message": message, "printed": printed, "empty": empty}
        results[id] = result
        if tell is not None:
            tell(id, result)

    while left := [job for job in jobs if job[0] not in results]:
        if strikes == STRIKES:
            for id, *_ in left:
                note(id, "failed", NOT_RUN)
            break
        report = f"{request['report']}.{strikes}"
        stopped, why, printed = follow(
            start, request | {"jobs": left, "report": report}, seconds, note
        )
        if stopped is None:  # it came to its end
            for id, *_ in [job for job in jobs if job[0] not in results]:
                note(id, "failed", DIED)
        elif stopped == "import":
            for id, *_ in left:
                note(id, "failed", why, printed)
        else:
            note(stopped, "failed", why)
            strikes += 1
    return {id: results[id] for id, *_ in jobs}


def follow(start, request, seconds, note):
    """Run one process to its end. Returns (the test that stopped it or "import" or None, why,
    what it printed).
    """
    path = Path(request["report"])
    path.touch()
    pid, now, at, over = start.start(request), "import", 0, False
    since, worked = time.monotonic(), 0.0
    try:
        while True:
            over = start.ended(pid)  # asked first: then the file is complete
            lines, at = new_lines(path, at)
            for event in lines:
                if "broken" in event:
                    return "import", event["broken"], event["printed"]
                if "end" in event:
                    return None, "", ""
                if "start" in event:
                    now, since, worked = event["start"], time.monotonic(), cpu_seconds(pid)
                elif event["done"] != "import":
                    note(event.pop("done"), **event)
            limit = IMPORT_SECONDS + seconds if now == "import" else seconds
            if over:
                return now, DIED, ""
            if cpu_seconds(pid) - worked > limit or time.monotonic() - since > PATIENCE * limit:
                return now, OUT_OF_TIME.format(limit), ""
            time.sleep(POLL)
    finally:
        kill(pid, over)
        until = time.monotonic() + 5
        while not over and not start.ended(pid) and time.monotonic() < until:
            time.sleep(POLL)


def cpu_seconds(pid):
    """What a process has computed so far: on a busy machine too the same code takes the same time.
    Where nobody says, 0: then patience alone ends what waits.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def new_lines(path, at):
    """(events written since byte `at`, where they end)."""
    with open(path, "rb") as file:
        file.seek(at)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return [e for e in events if isinstance(e, dict)], at + len(whole)
