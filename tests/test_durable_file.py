"""Files are whole on the disk or as they were; the system's refusal is one line."""

import contextlib
import resource

import pytest

from zeda_megatron.durable_file import append_whole, copy_whole, write_atomically, write_result
from zeda_megatron.errors import UserError


@contextlib.contextmanager
def no_file_longer_than(size):
    """The system refuses to write beyond `size` bytes, in the middle of a write too, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_could_not_be_added_whole_is_taken_back(tmp_path):
    file = tmp_path / "lines"
    append_whole(file, b"first\n")
    with no_file_longer_than(10), pytest.raises(OSError):
        append_whole(file, b"second, too long\n")
    assert file.read_bytes() == b"first\n"
    append_whole(file, b"third\n")
    assert file.read_bytes() == b"first\nthird\n"


def test_a_file_keeps_its_content_when_the_new_one_does_not_fit(tmp_path):
    file, source = tmp_path / "facts.json", tmp_path / "source"
    write_atomically(file, "old")
    source.write_text("x" * 100)
    for write in (lambda: write_atomically(file, "y" * 100), lambda: copy_whole(source, file)):
        with no_file_longer_than(10), pytest.raises(OSError):
            write()
        assert file.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.json", "source"]


def test_a_result_that_cannot_be_written_is_told_with_flag_and_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=f"--out {tmp_path}/taken/r.json: cannot be written \\(.+\\)"):
        write_result("--out", tmp_path / "taken" / "r.json", "{}")
    write_result("--out", tmp_path / "new" / "r.json", "{}")
    assert (tmp_path / "new" / "r.json").read_text() == "{}"
