"""Runs `imate-mlx` in processes of their own, and breaks them at a moment that is asked for.

A job is a line of JSON on stdin, its result a line of JSON on stdout. Importing takes ten times as
long as a small run, so on Linux each job is a fork of this process, which has imported all and
computed nothing: neither MLX nor its BLAS has a thread yet. Elsewhere (a Mac's libraries do not
bear forking) each job starts an interpreter.

A moment is a change to the run's folder that is about to happen: a file opened for writing, synced,
renamed, removed, ...; with the lines of metrics.jsonl the steps are moments too.
"""

import ctypes
import errno
import fcntl
import importlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork

CHANGES = {
    "fcntl.flock",
    "open",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
}


class Watch:
    """Counts the moments of a run and acts at one of them."""

    def __init__(self, folder: str, trace: str, at: int, act: str) -> None:
        self.folder, self.at, self.act = folder, at, act
        self.count, self.is_busy = 0, False
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.fsync, self.fcntl = os.fsync, fcntl.fcntl
        sys.addaudithook(self.hear)
        os.fsync = self.synced
        if sys.platform == "darwin":  # there a file is brought to the disk by another call
            fcntl.fcntl = self.controlled

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or self.is_busy:
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = arguments[0]
        if isinstance(path, int):
            path = self.path_of(path)
        # A name alone is relative to a folder that is being emptied.
        path = os.fspath(path)
        if os.path.isabs(path) and not path.startswith(self.folder):
            return
        self.moment(event, path)

    def synced(self, descriptor: int) -> None:
        self.moment("fsync", self.path_of(descriptor), descriptor)
        self.fsync(descriptor)

    def controlled(self, descriptor: int, command: int, *rest: Any) -> Any:
        if sys.platform == "darwin" and command == fcntl.F_FULLFSYNC:
            self.moment("fsync", self.path_of(descriptor), descriptor)
        return self.fcntl(descriptor, command, *rest)

    def path_of(self, descriptor: int) -> str:
        if sys.platform == "darwin":
            found = self.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(bytes(1))
            # Without links, which /tmp and /var are there.
            return os.fsdecode(found).replace(os.path.realpath(self.folder), self.folder, 1)
        name = f"/proc/self/fd/{descriptor}"
        return os.readlink(name) if os.path.exists(name) else ""

    def moment(self, event: str, path: str, descriptor: int = -1) -> None:
        self.is_busy = True
        os.write(self.trace, f"{event} {path.removeprefix(self.folder)}\n".encode())
        self.count += 1
        if self.count == self.at + 1:
            if self.act.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[self.act])
            elif self.act == "tear":
                self.tear(path, descriptor)
                os.kill(os.getpid(), signal.SIGKILL)
        self.is_busy = False
        if self.act == "fill" and self.count > self.at and event in ("open", "os.mkdir", "fsync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def tear(self, path: str, descriptor: int) -> None:
        """Leave half of a file that was just written, or of a line about to be."""
        if descriptor >= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.truncate(path, os.fstat(descriptor).st_size // 2)
        elif path.endswith("metrics.jsonl"):
            with open(path, "a") as file:
                file.write('{"event": "step", "st')


def prepare(base: str) -> None:
    """Import all that a run does, also what its libraries import late."""
    for name in ("results.terminal", "training.loop"):
        importlib.import_module(f"interviewmate_mlx.{name}")
    from interviewmate_mlx.base.base import Base

    Base.open(base)


def run(job: dict[str, Any]) -> int:
    """Be the process of a job; return its exit code."""
    from interviewmate_mlx.cli import main

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.chdir(job["cwd"])
    sys.argv = ["imate-mlx", *job["words"]]
    if job["unprivileged"]:
        drop_privileges()
    if job["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    watch = Watch(job["folder"], job["trace"], job["at"], job["act"])
    try:
        main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    watch.moment("exit", "")
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def drop_privileges() -> None:
    """Give up root's right to write everywhere; the files stay its own."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
            raise OSError(ctypes.get_errno(), "capset")


def main() -> None:
    if sys.argv[1] == "--job":
        os._exit(run(json.loads(sys.argv[2])))
    if sys.platform == "linux":
        prepare(sys.argv[1])
    for line in sys.stdin:
        if sys.platform == "linux":
            process = os.fork()
            if process == 0:
                os._exit(run(json.loads(line)))
        else:
            process = subprocess.Popen([sys.executable, __file__, "--job", line]).pid
        status = os.waitpid(process, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            print(json.dumps({"stopped": process}), flush=True)
            status = os.waitpid(process, 0)[1]
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
