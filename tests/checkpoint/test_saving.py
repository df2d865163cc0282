"""Writing checkpoints, in the foreground and in the background: full disks, failing writers, order of events."""

import multiprocessing
import re
import resource
import shutil
import time
from contextlib import contextmanager

import pytest
import tiny_world
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from zeda_megatron.checkpoint import saving
from zeda_megatron.checkpoint.state import TRACKER, find_checkpoint
from zeda_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("one_process")


@contextmanager
def files_of_at_most(size: int):
    """Writing more into a file fails (in children too), as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_the_way(folder) -> list[str]:
    """What a failed save must not leave behind."""
    return [path.name for path in folder.iterdir() if "partial" in path.name or path.name == "iter_0000003"]


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("size", [100, 5_000, 60_000], ids=["common state", "small files", "data"])
def test_no_room_for_a_checkpoint_is_one_line_and_leaves_the_last_one_loadable(
    world, halfway, tmp_path, size, background
):
    folder = shutil.copytree(halfway, tmp_path / "run")
    run = tiny_world.start(world, save=folder, async_save=background)
    run.iteration = 3
    with (
        files_of_at_most(size),
        pytest.raises(UserError, match=rf"--save {folder}: cannot be written \(.*unharmed") as told,
    ):
        run.save()
        run.saver.finish()
    assert "\n" not in str(told.value)
    assert re.search(r"\((\[Errno 27\] File too large|.*unexpected pos \d+ vs \d+)\)", str(told.value))
    assert in_the_way(folder) == [] and (folder / TRACKER).read_text() == "2"
    assert tiny_world.start(world, save=folder).iteration == 2
    run.save()  # there is room again
    run.saver.finish()
    assert find_checkpoint(folder).name == "iter_0000003"


def written_slowly(monkeypatch, seconds=2.0):
    """The child that writes takes its time (it is forked: it has what is patched here)."""
    note = saving.note_own_files

    def slow(folder, writer):
        time.sleep(seconds)
        note(folder, writer)

    monkeypatch.setattr(saving, "note_own_files", slow)


def test_a_checkpoint_written_in_the_background_appears_when_it_is_whole_and_holds_what_was_saved(
    world, halfway, tmp_path, monkeypatch
):
    folder = shutil.copytree(halfway, tmp_path / "run")
    written_slowly(monkeypatch)
    run = tiny_world.start(world, save=folder, async_save=True)
    before = tiny_world.snapshot(run)
    run.iteration = 3
    run.save()
    run.saver.poll()
    assert find_checkpoint(folder).name == "iter_0000002" and in_the_way(folder)
    run.stepper.step([run.feed.dataset[row] for row in range(4)])  # training goes on meanwhile
    run.saver.finish()
    assert find_checkpoint(folder).name == "iter_0000003" and in_the_way(folder) == ["iter_0000003"]
    resumed = tiny_world.snapshot(tiny_world.start(world, save=folder))
    moved = tiny_world.snapshot(run)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in before.items())
    assert not all(torch.equal(moved[name], tensor) for name, tensor in before.items())


def test_the_next_save_waits_for_the_one_before(world, halfway, tmp_path, monkeypatch):
    folder = shutil.copytree(halfway, tmp_path / "run")
    written_slowly(monkeypatch)
    run = tiny_world.start(world, save=folder, async_save=True)
    for run.iteration in (3, 4):
        run.save()
    assert (folder / TRACKER).read_text() == "3"
    run.saver.finish()
    assert (folder / TRACKER).read_text() == "4"


def test_a_checkpoint_that_is_waited_for_leaves_no_process_behind(world, halfway, tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)  # as in a process that has not saved yet
    folder = shutil.copytree(halfway, tmp_path / "run")
    run = tiny_world.start(world, save=folder)
    before = multiprocessing.active_children()
    run.iteration = 3
    run.save()
    assert multiprocessing.active_children() == before
    assert filesystem_async._results_queue is None
    assert tiny_world.start(world, save=folder).iteration == 3


def test_a_writer_that_is_killed_is_one_line_that_names_save(world, halfway, tmp_path, monkeypatch):
    folder = shutil.copytree(halfway, tmp_path / "run")
    monkeypatch.setattr(saving, "note_own_files", lambda *_: time.sleep(600))
    run = tiny_world.start(world, save=folder, async_save=True)
    run.iteration = 3
    run.save()
    (call,) = run.saver._queue.async_calls
    call.async_caller.process.kill()
    monkeypatch.setattr(saving, "note_own_files", lambda *_: None)
    run.saver.abandon()
    assert in_the_way(folder) == []
    run.save()
    (call,) = run.saver._queue.async_calls
    call.async_caller.process.kill()
    with pytest.raises(UserError, match=rf"--save {folder}: cannot be written"):
        run.saver.finish()
    assert in_the_way(folder) == [] and tiny_world.start(world, save=folder).iteration == 2
