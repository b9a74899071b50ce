"""Start a program, and stay its parent for a while, to write down how it ended: nobody else is told that by the kernel.

Run by itself, as `python -I -S launch.py`: it loads in a few milliseconds, and holds nothing of who started it. On
standard input it reads, each ended by a zero byte: the file for the end (empty: none), for how many seconds to stay,
the number of arguments, the arguments, and then the environment as NAME=VALUE. On standard output it answers with one
line: the new process, which leads a session of its own, or `error NUMBER` if there is none. What the process writes
goes to our standard error. The file then holds `PID STATUS`, the status as `waitpid` has it.
"""

import os
import signal
import sys


def main() -> None:
    """Start it, answer, and wait."""
    words = sys.stdin.buffer.read().split(b"\0")[:-1]
    end_file, stay_s, count = words[0], int(words[1]), int(words[2])
    arguments, pairs = words[3 : 3 + count], words[3 + count :]
    environment = {name: value for name, _, value in (pair.partition(b"=") for pair in pairs)}
    trouble, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        become(arguments, environment, told)
    os.close(told)
    error = os.read(trouble, 16)
    os.write(1, b"error " + error + b"\n" if error else b"%d\n" % pid)
    os.close(1)
    if error or not end_file:
        os._exit(0)
    os.chdir("/")
    # Its end after that is no matter of a recovery any more: init will take it over.
    signal.alarm(stay_s)
    _, status = os.waitpid(pid, 0)
    with open(end_file + b".new", "wb") as file:
        file.write(b"%d %d\n" % (pid, status))
    os.rename(end_file + b".new", end_file)


def become(arguments: list[bytes], environment: dict[bytes, bytes], told: int) -> None:
    """Become the program; an error is told through the descriptor, which a success closes."""
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        # As a shell would: a program expects its signals as they are by default.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execve(arguments[0], arguments, environment)  # noqa: S606  # what this program is for
    except OSError as error:
        os.write(told, b"%d" % (error.errno or 0))
    os._exit(127)


def described(status: int) -> str:
    """Return what a wait status says."""
    if os.WIFSIGNALED(status):
        return signalled(os.WTERMSIG(status))
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def signalled(number: int) -> str:
    """Return what it means that a signal has ended a process."""
    hint = ", as the kernel does when the memory is used up" if number == signal.SIGKILL else ""
    names = {one.value: one.name for one in signal.Signals}
    return f"ended by {names.get(number, f'signal {number}')}{hint}"


if __name__ == "__main__":
    main()
