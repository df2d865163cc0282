"""The sandbox: what a model's code does stays inside, whatever it tries."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.sandbox import landlock, seccomp
from zeda_megatron.evaluation.sandbox.folder import SandboxFolder, sweep
from zeda_megatron.evaluation.sandbox.run import MIB, Limits, Program, Ways, run_program
from zeda_megatron.evaluation.sandbox.walls import find_walls, require_walls

WAYS = {
    "all": Ways(),
    "no namespaces": Ways(namespaces=False),
    "no filter": Ways(seccomp=False),
}
"""What machines have: all, containers without namespaces, kernels without seccomp."""
SHORT = Limits(seconds=5, memory=512 * MIB, threads=24)


@pytest.fixture(scope="module")
def standing():
    return {name: find_walls(ways) for name, ways in WAYS.items()}


@pytest.fixture(params=list(WAYS))
def ways(request, standing):
    if standing[request.param].missing:
        pytest.skip(standing[request.param].line())
    return WAYS[request.param]


def run(source: str, ways: Ways = Ways(), limits: Limits = SHORT, **files: str):  # noqa: B008  frozen
    return run_program({"program.py": source, **files}, ["program.py"], limits, ways)


def left_over(marker: str) -> list[int]:
    """Processes whose command line or environment names the marker."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(marker in part for part in process.info["cmdline"] or []):
            found.append(process.info["pid"])
    return found


def test_all_walls_stand_where_the_kernel_has_what_they_need(standing):
    if not (landlock.abi() and seccomp.supported()):
        pytest.skip("this kernel has no Landlock, or its system calls are not known")
    assert standing["no namespaces"].missing == []
    assert standing["all"].missing == [], standing["all"].line()


def test_a_file_that_can_be_read_is_a_wall_that_is_missing():
    """Namespaces make files read-only; without Landlock a program still reads them."""
    for ways in (Ways(landlock=False), Ways(landlock=False, namespaces=False)):
        walls = find_walls(ways)
        if not walls.stand:
            pytest.skip(walls.line())
        assert "files" in walls.missing
        assert "files MISSING" in walls.line() and "reading files outside is possible" in walls.line()
        with pytest.raises(UserError, match="reading files outside is possible"):
            require_walls(False, ways)


def test_a_harmless_program_runs(ways):
    outcome = run(
        "import sys; print(open('data.txt').read(), 6 * 7); sys.exit(3)", ways, **{"data.txt": "héllo"}
    )
    assert (outcome.reason, outcome.code, outcome.stdout) == ("exit", 3, "héllo 42\n")


def test_threads_and_files_in_its_folder_are_allowed(ways):
    source = """
import threading
out = []
t = threading.Thread(target=lambda: out.append(sum(range(10))))
t.start(); t.join()
open("made.txt", "w").write(str(out))
print(open("made.txt").read())
"""
    assert run(source, ways).stdout == "[45]\n"


def test_a_fork_bomb_ends_with_the_program(ways):
    marker = f"zeda-bomb-{os.getpid()}"
    source = f"""
import os, sys, time
made, tries = 0, 0
while tries < 64:
    tries += 1
    try:
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-I", "-c", "import time; time.sleep(60)  # {marker}"])
        made += 1
    except OSError:
        break
print(made, flush=True)
time.sleep(30)
"""
    outcome = run(source, ways, Limits(seconds=0.8, memory=512 * MIB, threads=24))
    assert outcome.reason == "time"
    assert int(outcome.stdout or 0) <= 24
    assert left_over(marker) == []


def test_a_daemon_by_double_fork_does_not_outlive_it(ways):
    marker = f"zeda-daemon-{os.getpid()}"
    source = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-I", "-c", "import time; time.sleep(60)  # {marker}"])
    os._exit(0)
os.wait()
print("gone")
"""
    run(source, ways)
    assert left_over(marker) == []


def test_ten_gigabytes_are_refused(ways):
    outcome = run("x = bytearray(10 << 30); print('got it')", ways)
    assert (outcome.code, outcome.stdout) == (1, "") and "MemoryError" in outcome.stderr


def test_there_is_no_network(ways):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        source = f"""
import socket
with socket.create_connection(("127.0.0.1", {port}), timeout=2) as s:
    print("connected")
"""
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            pass  # the server is there
        outcome = run(source, ways)
    assert outcome.code == 1 and "connected" not in outcome.stdout
    udp = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9)); print('yes')"
    assert run(udp, ways).code == 1


def test_nothing_is_written_outside_its_folder(ways, tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "kept.txt").write_text("mine")
    (tmp_path / "kept.txt").chmod(0o666)
    source = f"""
import os
done = []
for attempt in (
    lambda: open({str(tmp_path / "new.txt")!r}, "w").close(),
    lambda: open({str(tmp_path / "kept.txt")!r}, "w").close(),
    lambda: open({str(tmp_path / "kept.txt")!r}, "r+").truncate(0),
    lambda: os.unlink({str(tmp_path / "kept.txt")!r}),
    lambda: os.rename({str(tmp_path / "kept.txt")!r}, "here.txt"),
    lambda: os.chmod({str(tmp_path / "kept.txt")!r}, 0),
    lambda: os.symlink("x", {str(tmp_path / "link")!r}),
    lambda: os.mkdir({str(tmp_path / "folder")!r}),
    lambda: open("/tmp/zeda-outside", "w").close(),
    lambda: open("/dev/shm/zeda-outside", "w").close(),
    lambda: open("../zeda-outside", "w").close(),
):
    try:
        attempt()
        done.append(True)
    except OSError:
        done.append(False)
print(any(done), done)
"""
    assert run(source, ways).stdout.startswith("False")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    assert (tmp_path / "kept.txt").read_text() == "mine" and (
        tmp_path / "kept.txt"
    ).stat().st_mode & 0o777 == 0o666


def test_files_of_ours_cannot_be_read(ways, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("token")
    secret.chmod(0o644)
    for path in (secret, Path(__file__)):
        outcome = run(f"print(open({str(path)!r}).read())", ways)
        assert outcome.code == 1 and "PermissionError" in outcome.stderr


def test_a_hundred_megabytes_of_output_do_not_reach_us(ways):
    source = "import os\nfor _ in range(100):\n    os.write(1, b'x' * (1 << 20))\n    os.write(2, b'y' * (1 << 20))"
    outcome = run(source, ways)
    assert outcome.reason == "output"
    assert len(outcome.stdout) + len(outcome.stderr) <= SHORT.output


def test_its_folder_does_not_grow_without_end():
    source = "for i in range(40):\n    open(f'{i}', 'wb').write(b'x' * (8 << 20))"
    outcome = run(source, limits=Limits(seconds=10, disk=32 * MIB))
    assert outcome.code == 1 and "No space left" in outcome.stderr


def test_one_file_does_not_grow_without_end(ways):
    outcome = run("open('big', 'wb').write(b'x' * (80 << 20))", ways, Limits(seconds=10, disk=32 * MIB))
    assert outcome.code == 1 and "OSError" in outcome.stderr


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os, time; os.close(1); os.close(2); time.sleep(60)",
        "import signal, time\nfor s in set(signal.Signals) - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\n"
        "while True: time.sleep(1)",
        "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(60)",
    ],
    ids=["loop", "sleep", "streams closed", "signals ignored", "own session"],
)
def test_the_time_limit_holds(ways, source):
    before = time.monotonic()
    outcome = run(source, ways, Limits(seconds=0.3, memory=512 * MIB))
    assert outcome.reason == "time" and outcome.code is None
    assert time.monotonic() - before < 30  # not 60


def test_when_we_are_killed_it_ends_too(ways):
    marker = f"zeda-orphan-{os.getpid()}"
    code = (
        "from zeda_megatron.evaluation.sandbox.run import Limits, Ways, run_program\n"
        f"source = 'import time; time.sleep(60)  # {marker}'\n"
        f"run_program({{}}, ['-c', source], Limits(seconds=60), {ways!r})"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=env)
    while caller.poll() is None and len(left_over(f"# {marker}")) < 2:  # the caller names it as well
        time.sleep(0.02)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 20
    while left_over(f"# {marker}") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_over(f"# {marker}") == []


def test_we_and_the_system_cannot_be_signalled_or_traced(ways):
    source = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
done = []
for pid in ({os.getpid()}, os.getppid(), 1, -1):
    try:
        os.kill(pid, 0)
        done.append(pid)
    except OSError:
        pass
done += [pid for pid in ({os.getpid()}, 1) if libc.ptrace(16, pid, 0, 0) == 0]
print(done)
"""
    # With namespaces alone it may signal its own namespace: itself and the process 1 above it.
    assert run(source, ways).stdout in ("[]\n", "[-1]\n", "[1, -1]\n", "[1, -1, 1]\n")
    assert psutil.pid_exists(os.getpid())


REACHES = {
    "a datagram to a socket outside": """
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
a.sendto(b"x", target)""",
    "a sequence of packets": "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
    "descriptors to a socket outside": """
a, b = socket.socketpair()
a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))])""",
    "an address behind a pair": "a, b = socket.socketpair(); a.sendto(b'x', target)",
    "connecting a pair": "a, b = socket.socketpair(); a.connect(target)",
    "another's priority": "os.setpriority(os.PRIO_PROCESS, victim, 19)",
    "another's processors": "os.sched_setaffinity(victim, {0})",
    "another's scheduler": "os.sched_setscheduler(victim, os.SCHED_IDLE, os.sched_param(0))",
    "its own niceness": "os.nice(1)",
    "a signal by the owner of a pair": "a, b = socket.socketpair(); fcntl.fcntl(a, fcntl.F_SETOWN, victim)",
    "a signal of choice": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 9)",
    "a signal by ioctl": "a, b = socket.socketpair(); fcntl.ioctl(a, 0x8901, struct.pack('i', victim))",
    "news of a folder": "fcntl.fcntl(os.open('.', os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS)",
    "a lease": "fcntl.fcntl(os.open('f', os.O_RDWR | os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_WRLCK)",
    "inotify": "call('inotify_init1', 0)",
    "fanotify": "call('fanotify_init', 0, 0)",
    "the priority of input and output": "call('ioprio_set', 1, victim, 0)",
    "asynchronous input": "call('io_setup', 100, ctypes.byref(ctypes.c_ulong(0)))",
    "the kernel's log": "call('syslog', 10, 0, 0)",
    "a session of its own": "os.setsid()",
    "a group of its own": "os.setpgid(0, 0)",
    "outliving its parent": "if libc.prctl(1, 0, 0, 0, 0): raise OSError",
}


def test_nothing_outside_is_reached_without_namespaces_either(standing, tmp_path):
    """The filter alone: what namespaces would hide is refused, and ordinary use of the same calls is not."""
    if standing["no namespaces"].missing:
        pytest.skip(standing["no namespaces"].line())
    numbers = {**seccomp._DENIED[os.uname().machine]}
    bodies = [textwrap.indent(code.strip(), "    ") for code in REACHES.values()]
    attempts = "".join(f"def _{i}():\n{body}\n" for i, body in enumerate(bodies))
    source = f"""
import asyncio, ctypes, fcntl, os, socket, struct
victim, target, numbers = {os.getpid()}, {str(tmp_path / "socket")!r}, {numbers!r}
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if libc.syscall(numbers[name], *arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
{attempts}
reached = []
for i in range({len(REACHES)}):
    try:
        globals()[f"_{{i}}"]()
        reached.append(i)
    except OSError:
        pass
async def later():
    await asyncio.sleep(0)
    return "ran"
fcntl.fcntl(0, fcntl.F_GETFL)
print(reached, asyncio.run(later()))
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "socket"))
        os.chmod(tmp_path / "socket", 0o777)
        outcome = run(source, WAYS["no namespaces"])
    assert outcome.stdout == "[] ran\n", (outcome.stdout, outcome.stderr)


def test_a_folder_is_cleared_away_whatever_lies_in_it(ways):
    """Three thousand levels, folders that may not be listed, names that try to be in the way."""
    source = """
import os
os.mkdir("closed"); open("closed/f", "w").close()
os.mkdir("closed/below"); os.mkdir("none")
os.symlink("/", "link"); os.mkfifo("pipe"); open("a\\nb", "w").close()
at = os.open(".", os.O_RDONLY)
for _ in range(1500):
    os.mkdir("d", dir_fd=at)
    below = os.open("d", os.O_RDONLY, dir_fd=at)
    os.close(at)
    at = below
os.umask(0)
os.mkdir("a", 0o300); os.mkdir("a/b", 0o300); os.mkdir("a/b/c", 0)
"""
    with Program({"program.py": source}, ["program.py"], SHORT, ways) as program:
        folder = program._folder.path
        outcome = program.rest()
    assert outcome.code == 0, outcome.stderr
    assert not os.path.exists(folder)


def test_folders_of_dead_runs_are_cleared_and_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os, tempfile\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from zeda_megatron.evaluation.sandbox.folder import SandboxFolder\n"
        "folder = SandboxFolder()\nos.makedirs(folder.path + '/a/b')\nprint(folder.path, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    dead, mine = done.stdout.strip(), SandboxFolder()
    assert os.path.isdir(dead)
    assert sweep() == 1
    assert not os.path.exists(dead) and os.path.isdir(mine.path)
    mine.remove()
    assert list(tmp_path.iterdir()) == []


def test_our_environment_does_not_reach_it(ways, monkeypatch):
    monkeypatch.setenv("ZEDA_SECRET", "token")
    assert run("import os; print('ZEDA_SECRET' in os.environ)", ways).stdout == "False\n"


def test_an_answer_that_no_text_file_can_hold_is_no_fault_of_ours():
    assert run("# \ud800").reason == "exit"


def test_a_machine_without_walls_is_refused_unless_allowed():
    bare = Ways(namespaces=False, landlock=False, seccomp=False)
    with pytest.raises(UserError, match="--allow-weak-sandbox"):
        require_walls(False, bare)
    walls = require_walls(True, bare)
    assert "files" in walls.missing and "MISSING" in walls.line()
