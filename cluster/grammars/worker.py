"""The worker process of a gateway, which tries to compile grammars: `python -m
cluster.grammars.worker`, with the gateway's process id as argument and a socket as its input.

Each grammar is tried in a child that is forked for it, with limits on processor time and memory.
Nothing else has to start again when a child is ended.
"""

import os
import resource
import signal
import socket
import sys
from pathlib import Path

from cluster.grammars.compiling import MAX_SEARCH_CPU_S, Compiler
from cluster.grammars.wire import Channel, Job, Verdict
from workers.parent_death import die_with_parent

_OUT_OF_MEMORY = 3
"""Exit code of a child."""


def main(parent_pid: int) -> None:
    """Serve jobs until the gateway has gone."""
    if not die_with_parent(parent_pid):
        return
    os.nice(5)  # the gateway's event loop comes first
    channel = Channel(socket.socket(fileno=os.dup(0)))
    compiler = Compiler()
    while True:
        try:
            job = channel.receive_job()
        except (EOFError, OSError):
            return
        if (verdict := _tried(compiler, job)) is None:
            return  # the kernel is short of memory: start again
        channel.send_verdict(verdict)


def _tried(compiler: Compiler, job: Job) -> bytes | None:
    """Return the verdict of a child, or how it ended; None if it was ended from outside."""
    reading, writing = os.pipe()
    worker_pid = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            if die_with_parent(worker_pid):
                _try(compiler, job, writing)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return text
    match -code:
        case signal.SIGPROF | signal.SIGXCPU:
            return Verdict(ended="cpu").encode()
        case signal.SIGKILL:
            return None
        case signal.SIGABRT:  # what Rust does where memory cannot be had
            return Verdict(ended="memory").encode()
    return Verdict(ended="memory" if code == _OUT_OF_MEMORY else "crash").encode()


def _try(compiler: Compiler, job: Job, writing: int) -> None:
    """Write the verdict and end this process."""
    _limit_memory(job.max_bytes)
    _limit_time(job.cpu_s)
    # The last trial of the search may take as long as the first.
    search_s = MAX_SEARCH_CPU_S + job.cpu_s
    if job.beginning:
        verdict = compiler.beginning_verdict(job.text, job.beginning)
    else:
        verdict = compiler.verdict(job.text, lambda: _limit_time(search_s))
    _limit_time(0)
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(verdict.encode())
    os._exit(0)


def _limit_time(cpu_s: float) -> None:
    """Let the kernel end this process after so much processor time from now."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _limit_memory(max_bytes: int) -> None:
    """Let this process have so much address space beside what it has."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no /proc
        pages = 0
    limit = pages * resource.getpagesize() + max_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
