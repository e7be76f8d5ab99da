"""Progress passes every item on, and reports plain lines in logs and a bar on terminals."""

import contextlib
import fcntl
import os
import struct
import sys
import termios

import pytest

from conceptshare.io import progress as module
from conceptshare.io.progress import info, progress


@pytest.mark.parametrize("total", [None, 5])
def test_yields_every_item_in_order(total, capsys):
    assert list(progress(iter("abcde"), total, "letters", "items")) == list("abcde")
    assert capsys.readouterr().out == ""


def test_reports_the_end_in_one_plain_line(capsys):
    list(progress(range(1234), 1234, "features of vit@0", "layers"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("features of vit@0: 1,234 layers in ")
    assert line.endswith("/s)")


def test_accepts_no_items(capsys):
    assert list(progress([], 0, "nothing", "items")) == []
    assert "nothing: 0 items" in capsys.readouterr().err


@pytest.mark.parametrize(("total", "words"), [(3, "steps: 2 of 3 items, "), (None, "steps: 2 items (")])
def test_writes_a_line_to_logs_at_intervals(total, words, capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    list(progress(range(3), total, "steps", "items"))
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 4
    assert words in err
    assert ("s left" in err) == (total is not None)
    assert "\r" not in err


def test_consumes_items_one_at_a_time():
    taken = []

    def items():
        for item in range(10):
            taken.append(item)
            yield item

    steps = progress(items(), 10, "steps", "items")
    assert [next(steps), next(steps)] == [0, 1]
    assert taken == [0, 1]


def test_shows_a_bar_on_terminals(monkeypatch):
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert list(progress(range(3), 3, "training", "steps")) == [0, 1, 2]
        monkeypatch.undo()
    shown = _all_of(controller)
    os.close(controller)
    assert "training" in shown
    assert "3/3" in shown


def _all_of(controller):
    """Everything written to a terminal until it was closed; each read returns what has arrived so far."""
    shown = b""
    with contextlib.suppress(OSError):  # on Linux: the other end is closed
        while part := os.read(controller, 10_000):
            shown += part
    return shown.decode()


def test_writes_lines_to_stderr_immediately(capsys):
    info("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")
