"""What the person who watches sees on stderr of long work."""

import re
import sys

import pytest

from zeda_megatron.runtime import terminal
from zeda_megatron.runtime.terminal import ending, progress_bar, told


def work(**how) -> None:
    with progress_bar(4, "row", "fit", **how) as bar:
        for number in range(4):
            bar.update()
            if number == 1:
                told("a line")


def test_a_terminal_sees_how_far_the_work_is_and_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work()
    shown = capsys.readouterr().err
    assert re.search(r"fit: 100%.* 4/4 \[\d\d:\d\d<\d\d:\d\d,.*row/s\]", shown)
    assert "\r" in shown and "a line\n" in shown


def test_a_log_file_gets_whole_lines_and_none_of_work_that_is_soon_over(monkeypatch, capsys):
    work()
    assert capsys.readouterr().err == "a line\n"
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0)
    work(initial=1)
    shown = capsys.readouterr().err
    assert "\r" not in shown and "a line" in shown.splitlines()
    bars = [line for line in shown.splitlines() if line != "a line"]
    assert "1/4" in bars[0] and all(line.startswith("fit: ") for line in bars)


@pytest.mark.parametrize("how", ["told not to", "another rank"])
def test_no_bar_is_drawn_for_who_does_not_watch(monkeypatch, capsys, how):
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0)
    if how == "another rank":
        monkeypatch.setattr(terminal, "rank", lambda: 1)
    work(shown=how == "another rank")
    assert capsys.readouterr().err == ("" if how == "another rank" else "a line\n")


def test_a_command_ends_with_what_it_wrote_and_what_comes_next():
    assert ending("wrote a.json") == "wrote a.json"
    assert ending("wrote a.json", "zeda b") == "wrote a.json; next: zeda b"
