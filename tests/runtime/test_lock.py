"""Two runs never write into one folder, and a dead run keeps no folder: with real processes."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.runtime.lock import BEAT_SECONDS, NAME, STALE_SECONDS, LockFile, LockLost, locked


def _hold(path: Path, held) -> None:
    os.environ |= {"SLURM_JOB_ID": "41", "SLURM_CLUSTER_NAME": "c"}
    LockFile(path).take()
    held.set()
    time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock; it is killed at the end."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / NAME, held))
    process.start()
    try:
        assert held.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture
def file(tmp_path):
    return tmp_path / NAME


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)


def rewrite(file: Path, **changes) -> None:
    """The lock as if others had written it, with its time as it was."""
    times = file.stat()
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def silent(file: Path, seconds: float) -> None:
    past = time.time() - seconds
    os.utime(file, (past, past))


def test_a_second_run_is_told_who_works_there_and_since_when_it_is_silent(holder, file):
    silent(file, 40)
    with pytest.raises(UserError) as refused, locked(file, "--save"):
        pass
    said = str(refused.value)
    assert f"--save {file}: process {holder.pid} on " in said and "Slurm job 41" in said
    assert "last sign of life 40 s ago" in said and "\n" not in said
    assert json.loads(file.read_text())["pid"] == holder.pid


def test_after_kill_9_on_this_host_the_lock_is_taken_over_at_once(holder, file):
    holder.kill()
    holder.join()
    told = []
    with locked(file, "--save", told.append):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()
    assert len(told) == 1 and "that process is gone" in told[0]


def test_an_id_that_another_process_has_now_is_not_the_owner(holder, file):
    rewrite(file, started=1.0)
    with locked(file, "--save", lambda text: None):
        pass


def test_of_a_dead_run_elsewhere_the_lock_goes_after_the_stated_time(holder, file):
    holder.kill()
    holder.join()
    rewrite(file, machine="another")
    with pytest.raises(UserError, match=r"start again in \d+ s"), locked(file, "--save"):
        pass
    silent(file, STALE_SECONDS - 20)
    with pytest.raises(UserError), locked(file, "--save"):
        pass
    silent(file, STALE_SECONDS + 1)
    told = []
    with locked(file, "--save", told.append):
        pass
    assert "no sign of life for 30" in told[0]


@pytest.mark.parametrize(
    ("restarts", "cluster", "taken"), [("1", "c", True), ("0", "c", False), ("1", "d", False)]
)
def test_a_requeued_job_takes_its_own_lock_over_at_once(holder, file, monkeypatch, restarts, cluster, taken):
    """The node may have died with the lock; Slurm never runs one job twice at a time."""
    rewrite(file, machine="another")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    lock = LockFile(file)
    if not taken:
        with pytest.raises(UserError):
            lock.take()
        return
    assert "before it was requeued" in lock.take()
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "x", "host": "h"}'])
def test_a_lock_that_cannot_be_read_counts_until_a_heartbeat_is_due(file, text):
    file.write_text(text)
    with pytest.raises(UserError, match="an unknown run works here"), locked(file, "--save"):
        pass
    silent(file, BEAT_SECONDS + 1)  # who is alive has written its name by then
    with locked(file, "--save", lambda text: None):
        pass


def test_a_run_that_ends_while_it_takes_the_lock_leaves_none(file, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LockFile, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        LockFile(file).take()
    assert not file.exists()


def _race(path: Path, start, results) -> None:
    lock = LockFile(path)
    start.wait()
    try:
        lock.take()
        results.put(lock.is_mine())
    except UserError:
        results.put(False)
    time.sleep(3)  # alive while the others look


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_together_one_gets_the_lock(file, stale):
    context = multiprocessing.get_context("fork")
    if stale:
        file.write_text("{}")
        silent(file, STALE_SECONDS + 1)
    start, results = context.Barrier(6), context.Queue()
    racers = [context.Process(target=_race, args=(file, start, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    won = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sum(won) == 1


def test_the_heart_beats_while_the_run_works(file):
    lock = LockFile(file, beat=0.05)
    lock.take()
    silent(file, 1000)
    deadline = time.monotonic() + 60
    while lock.look().age > 100 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lock.look().age < 100
    lock.release()
    assert list(file.parent.iterdir()) == []


def test_a_run_that_was_overtaken_writes_nothing_more_and_leaves_the_lock(file):
    lock = LockFile(file)
    lock.take()
    rewrite(file, token="another", pid=1)
    with pytest.raises(LockLost, match=r"now belongs to process 1 on .*ends without writing"):
        lock.require()
    lock.release()
    assert json.loads(file.read_text())["token"] == "another"


def test_a_lock_deleted_by_hand_is_made_again(file):
    lock = LockFile(file)
    lock.take()
    file.unlink()
    lock.require()
    assert file.exists()
    lock.release()
    assert not file.exists()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "a").write_text("")
    with (
        pytest.raises(UserError, match=r"--save .*a: cannot be written"),
        locked(tmp_path / "a" / NAME, "--save"),
    ):
        pass


def test_the_folders_that_a_failed_run_made_go_with_its_lock_and_others_stay(tmp_path):
    (tmp_path / "was there").mkdir()
    for place in ("new/deeper", "was there"):
        with pytest.raises(UserError, match="no such data"), locked(tmp_path / place / NAME, "--save"):
            raise UserError("no such data")
    with pytest.raises(UserError), locked(tmp_path / "used" / NAME, "--save"):
        (tmp_path / "used" / "metrics.jsonl").write_text("1")
        raise UserError("later")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used", "was there"]
