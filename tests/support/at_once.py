"""Several threads or processes that do the same at the same moment."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.support.waiting import finish

# A program that prints its pid and ends its first thread, while another one sleeps on.
WITHOUT_ITS_FIRST_THREAD = """
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(98.7654,)).start()
print(os.getpid(), flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # exit(2), of this thread
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run `code` in a process of its own, with `arguments` in sys.argv."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def at_once(code: str, count: int, *arguments: object) -> list[str]:
    """What `count` processes print that run `code` at the same moment: it has to call `ready()` before the race."""
    ready = "def ready():\n    print('ready', flush=True)\n    input()\n"
    processes = [start(ready + textwrap.dedent(code), *arguments, number) for number in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [finish(process)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert all(process.returncode == 0 for process in processes)
    return answers
