"""Writing checkpoints, in the foreground and in the background: full disks, failing writers, order of events."""

import resource
import shutil
from contextlib import contextmanager

import pytest
import tiny_world

from zeda_megatron.checkpoint.state import TRACKER, find_checkpoint
from zeda_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def halfway(world, tmp_path_factory):
    """A run stopped (and saved) after two steps."""
    folder = tmp_path_factory.mktemp("halfway")
    tiny_world.start(world, save=folder, exit_interval=2).run()
    return folder


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
    assert in_the_way(folder) == [] and (folder / TRACKER).read_text() == "2"
    assert tiny_world.start(world, save=folder).iteration == 2
    run.save()  # there is room again
    run.saver.finish()
    assert find_checkpoint(folder).name == "iter_0000003"
