"""A folder appears complete or not at all; what is done survives an interruption, and nobody works there twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple

import pytest
import torch

from zeda_megatron.convert.file_writer import FileWriter
from zeda_megatron.errors import UserError
from zeda_megatron.runtime import whole_folder
from zeda_megatron.runtime.whole_folder import staged_folder

REQUEST = {"seed": 1}


class Text:
    """A file that counts how often it was written."""

    def __init__(self, name, text, fails=None):
        self.name, self.text, self.nbytes, self.fails, self.written = name, text, len(text), fails, 0

    def write(self, stream):
        self.written += 1
        stream.write(self.text.encode())
        if self.fails:
            raise self.fails
        return {"length": len(self.text)}


def parts(*failures):
    names = ["a.txt", "below/b.txt", "c.txt"]
    return [Text(name, name * 100, fails) for name, fails in zip(names, (*failures, None, None, None))]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(out, all_parts, request=REQUEST, **flags):
    with staged_folder(out, request, **flags) as staging:
        return FileWriter(staging, all_parts, 1, "test").run(Text.write)


def test_finished_folder_has_its_name_and_nothing_else_is_left(tmp_path):
    done = make(tmp_path / "out", parts())
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a.txt", "below", "c.txt"]
    assert (tmp_path / "out/below/b.txt").read_text() == "below/b.txt" * 100
    assert [part.facts["length"] for part in done] == [500, 1100, 500]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_work_goes_on_where_it_stopped(tmp_path, failure):
    out = tmp_path / "out"
    with pytest.raises((KeyboardInterrupt, UserError)) as stop:
        make(out, parts(None, failure))
    assert names(tmp_path) == ["out.partial"]
    if isinstance(failure, OSError):
        assert str(stop.value) == (
            f"{out}: No space left on device; what is done stays in {out}.partial, the same command goes on from there"
        )
    again = parts()
    done = make(out, again)
    assert [part.written for part in again] == [0, 1, 1]
    assert names(tmp_path) == ["out"] and names(out) == ["a.txt", "below", "c.txt"]
    assert [part.facts["length"] for part in done] == [500, 1100, 500]


def test_finished_file_that_changed_meanwhile_is_written_again(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(out, parts(None, None, KeyboardInterrupt()))
    work = tmp_path / "out.partial/work"
    (work / "a.txt").write_text("A" + (work / "a.txt").read_text()[1:])
    (work / "stray.txt").write_text("left over")
    again = parts()
    make(out, again)
    assert [part.written for part in again] == [1, 0, 1]
    assert names(out) == ["a.txt", "below", "c.txt"] and (out / "a.txt").read_text() == "a.txt" * 100


def test_mistake_of_the_input_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="bad tensor"):
        make(tmp_path / "out", parts(None, UserError("bad tensor")))
    assert names(tmp_path) == []


def test_another_request_does_not_mix_with_what_is_there(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(out, parts(None, KeyboardInterrupt()))
    with pytest.raises(
        UserError, match=r"out\.partial: holds an unfinished conversion with other seed; .*--restart"
    ):
        make(out, parts(), {"seed": 2})
    again = parts()
    make(out, again, {"seed": 2}, restart=True)
    assert [part.written for part in again] == [1, 1, 1]


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    out = tmp_path / "out"
    script = f"""
import time
from zeda_megatron.runtime import whole_folder
from zeda_megatron.runtime.whole_folder import staged_folder
with staged_folder({str(out)!r}, {REQUEST!r}):
    print("in", flush=True)
    time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UserError, match=rf"out\.partial: process {other.pid} on .* is at work there"):
        make(out, parts())
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    make(out, parts())  # a dead owner holds nobody up
    assert names(tmp_path) == ["out"]


def test_foreign_partial_folder_is_not_touched(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"out\.partial: was not made by a conversion"):
        make(tmp_path / "out", parts(), restart=True)
    assert names(tmp_path / "out.partial") == ["thesis.tex"]


def test_existing_folder_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"out: folder is not empty"):
        make(out, parts())
    assert (out / "model.safetensors").read_text() == "precious"
    make(out, parts(), overwrite=True)
    assert names(out) == ["a.txt", "below", "c.txt"] and names(tmp_path) == ["out"]


def test_overwrite_does_not_delete_a_folder_that_is_no_checkpoint(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds no checkpoint"):
        make(out, parts(), overwrite=True)
    assert (out / "thesis.tex").exists()


def test_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="folder is not empty"), staged_folder(out, REQUEST) as staging:
        FileWriter(staging, parts(), 1, "test").run(Text.write)
        out.mkdir()
        (out / "zeda.json").write_text("theirs")
    assert (out / "zeda.json").read_text() == "theirs"
    assert names(tmp_path) == ["out", "out.partial"]  # the work is not lost
    shutil.rmtree(out)
    again = parts()
    make(out, again)
    assert [part.written for part in again] == [0, 0, 0]


def test_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda folder: usage(1000, 900, 100))
    whole_folder.check_space(tmp_path / "new" / "out", 100)
    with pytest.raises(
        UserError, match=rf"--out {tmp_path}/new/out: needs 101 bytes more .* but {tmp_path} has 100 free"
    ):
        whole_folder.check_space(tmp_path / "new" / "out", 101)


def test_owner_is_told(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", parts(None, KeyboardInterrupt()))
    owner = json.loads((tmp_path / "out.partial/owner.json").read_text())
    assert owner["pid"] == os.getpid() and owner["host"] and owner["since"]


def test_the_reason_is_told_though_another_thread_is_stopped_inside_of_torchs_writer(tmp_path):
    started, (first, second) = threading.Event(), parts()[:2]

    class Slow:
        """A stream that is stopped between two pieces of one tensor."""

        def __init__(self, stream):
            self.stream, self.tell, self.flush, self.pieces = stream, stream.tell, stream.flush, 0

        def write(self, data):
            self.pieces += 1
            if self.pieces == 2:
                started.set()
                assert writer._stop.wait(30)
            return self.stream.write(data)

    def write(file, stream):
        if file is second:
            torch.save(torch.zeros(1000), Slow(stream))
        assert started.wait(30)
        raise OSError(5, "Input/output error")

    with (
        pytest.raises(UserError, match="Input/output error"),
        staged_folder(tmp_path / "out", REQUEST) as staging,
    ):
        writer = FileWriter(staging, [second, first], 2, "test")
        writer.run(write)
