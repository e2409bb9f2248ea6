"""Progress in a log: whole lines with rate and remaining time, nothing that only a terminal understands."""

import pytest

from nspo.run import progress


def drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, delay: float) -> str:
    """What two nested bars write to a log when every update is due."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "DELAY_SECONDS", delay)
    with progress.track("outer", 2, "step") as outer, progress.track("inner", 2, "token", start=1) as inner:
        inner.update(1)
        outer.update(2)
    return capsys.readouterr().err


def test_a_log_gets_plain_lines_with_rate_and_count(capsys, monkeypatch):
    """Each bar is lines of its own, without carriage returns or cursor moves, and counts what was done before."""
    text = drawn(capsys, monkeypatch, delay=0.0)
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert any(line.startswith("outer: 100%") and "2/2" in line and "step" in line for line in lines)
    assert any(line.startswith("inner:  50%") and "1/2" in line for line in lines)


def test_short_work_writes_nothing(capsys, monkeypatch):
    """Work that ends within the delay leaves the log alone."""
    assert drawn(capsys, monkeypatch, delay=60.0) == ""
