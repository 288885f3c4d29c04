"""Steps and locks, with real processes that are killed."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dldkit import step
from dldkit.errors import UserError
from dldkit.step import Lock, Step, atomic

# Says when it holds the lock, then works until it is told to end, or is killed.
HOLDER = textwrap.dedent("""
    import sys
    from dldkit import step
    step.HEARTBEAT, step.STALE = 0.3, 4
    if sys.argv[2] == "elsewhere":  # as a process of another machine would look
        step._machine = lambda: "another"
    with step.Lock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
    """)


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats as `HOLDER` has them."""
    monkeypatch.setattr(step, "HEARTBEAT", 0.3)
    monkeypatch.setattr(step, "STALE", 4)


@pytest.fixture
def holder(tmp_path):
    """Start processes that hold a lock."""
    started = []

    def start(where="here"):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock"), where]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def make(directory, files, calls, **options):
    with Step(directory, files, **options) as made:
        if not made.done:
            calls.append(options)
            (directory / "result").write_text(str(options))


def test_finished_step_is_skipped_until_content_or_options_change(tmp_path):
    source, calls = tmp_path / "text", []
    source.write_text("a b")
    for _ in range(2):
        make(tmp_path / "out", {"text": source}, calls, rate=8000)
    assert len(calls) == 1

    os.utime(source, (1, 1))  # touched, and moved
    source = source.rename(tmp_path / "moved")
    make(tmp_path / "out", {"text": source}, calls, rate=8000)
    assert len(calls) == 1

    make(tmp_path / "out", {"text": source}, calls, rate=16000)
    source.write_text("a c")
    make(tmp_path / "out", {"text": source}, calls, rate=16000)
    assert len(calls) == 3


def test_interrupted_step_goes_on_but_not_with_other_input(tmp_path):
    def interrupted(rate):
        with pytest.raises(KeyboardInterrupt):
            with Step(tmp_path, {}, rate=rate) as made:
                assert not made.done
                (tmp_path / str(rate)).touch()
                raise KeyboardInterrupt

    interrupted(8000)
    with Step(tmp_path, {}, rate=8000):
        assert (tmp_path / "8000").exists()
    interrupted(16000)
    assert not (tmp_path / "8000").exists()  # begun anew
    assert not Step(tmp_path, {}, rate=8000).is_done()


def test_kept_directory_says_what_changed(tmp_path):
    source = tmp_path / "scp"
    source.write_text("1")
    with Step(tmp_path / "exp", {"wav.scp": source}, keep=True, epochs=1):
        (tmp_path / "exp" / "model").touch()
    source.write_text("2")
    again = Step(tmp_path / "exp", {"wav.scp": source}, keep=True, epochs=2)
    assert again.changes("options") == ["epochs: 1 -> 2"]
    assert again.changes("files") == ["wav.scp"]
    with again:
        assert not again.done and (tmp_path / "exp" / "model").exists()


def test_bound_directory_takes_other_options_but_no_other_files(tmp_path):
    source, exp = tmp_path / "scp", tmp_path / "exp"

    def train(**options):
        step_ = Step(exp, {"wav.scp": source}, keep=True, bound_by="model", **options)
        with step_:
            return step_.done

    source.write_text("1")
    train(epochs=1)
    source.write_text("2")
    train(epochs=1)  # there was nothing to lose yet
    (exp / "model").touch()
    assert not train(epochs=2)
    assert train(epochs=2)
    source.write_text("3")
    with pytest.raises(UserError, match="exp was begun with other input: wav.scp"):
        train(epochs=2)
    assert not (exp / ".lock").exists()


def test_directory_of_strangers_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="thesis.tex"):
        Step(tmp_path, {}).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_in_the_way_and_missing_input(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(UserError, match="is a file"):
            Step(directory, {}).__enter__()
    with pytest.raises(UserError, match="nowhere"):
        Step(tmp_path, {"text": tmp_path / "nowhere"})


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "table"
    path.write_text("old")
    with pytest.raises(ValueError):
        with atomic(path) as part:
            part.write_text("ne")
            raise ValueError
    assert path.read_text() == "old"
    with atomic(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_second_process_waits_and_names_the_holder(quick, holder, tmp_path, caplog):
    first = holder()
    with pytest.raises(UserError, match=f"process {first.pid} on .* since 20"):
        Lock(tmp_path / ".lock", wait=False).__enter__()
    second = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock"), "here"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(5)  # longer than STALE: the first one is alive
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == first.pid
    first.communicate("")  # it ends
    assert second.stdout.readline() == "held\n"
    _, errors = second.communicate("")
    assert f"in use by process {first.pid}" in errors
    assert not (tmp_path / ".lock").exists()


def test_lock_of_a_killed_process_is_taken_over_at_once(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "STALE", math.inf)  # no heartbeat is waited for
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lock(tmp_path / ".lock"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_of_another_machine_is_stale_without_heartbeat(quick, holder, tmp_path):
    process = holder("elsewhere")
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = time.monotonic()
    with Lock(tmp_path / ".lock"):
        assert time.monotonic() - begun > 4


def test_who_may_not_wait_takes_a_stale_lock_and_refuses_one_in_use(
    quick, holder, tmp_path
):
    """As a job of several nodes that is requeued on others than before."""
    process = holder("elsewhere")
    with pytest.raises(UserError, match=f"in use by process {process.pid}"):
        with Lock(tmp_path / ".lock", wait=False):
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lock(tmp_path / ".lock", wait=False):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_who_lost_the_lock_stops(holder, tmp_path):
    process = holder()
    (tmp_path / ".lock").unlink()  # by mistake: it is put back
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
        time.sleep(0.1)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid
    other = json.loads((tmp_path / ".lock").read_text()) | {"token": "of another one"}
    (tmp_path / ".lock").write_text(json.dumps(other))
    assert process.wait(60) == -signal.SIGTERM


def test_a_disk_that_is_away_for_a_moment_does_not_end_the_heartbeat(quick, tmp_path):
    directory = tmp_path / "exp"
    directory.mkdir()
    with Lock(directory / ".lock") as lock:
        directory.rename(tmp_path / "away")
        time.sleep(1)
        (tmp_path / "away").rename(directory)
        before = lock.path.stat().st_mtime_ns
        time.sleep(1)
        assert lock.path.stat().st_mtime_ns > before


def test_of_many_waiting_processes_one_holds_it_at_a_time(tmp_path):
    """Each adds one to a number, which loses counts when two do so at once."""
    work = textwrap.dedent("""
        import pathlib, sys, time
        from dldkit import step
        step.HEARTBEAT, step.STALE = 0.3, 4
        with step.Lock(sys.argv[1] + "/.lock"):
            path = pathlib.Path(sys.argv[1], "count")
            count = int(path.read_text())
            time.sleep(0.05)
            path.write_text(str(count + 1))
        """)
    (tmp_path / "count").write_text("0")
    (tmp_path / ".lock").write_text("")  # all begin with one that is stale
    command = [sys.executable, "-c", work, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(6)]
    assert [process.wait() for process in processes] == [0] * 6
    assert (tmp_path / "count").read_text() == "6"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_second_job_uses_what_the_first_made(tmp_path):
    work = textwrap.dedent("""
        import pathlib, sys, time
        from dldkit.step import Step
        with Step(sys.argv[1], {}, rate=8000) as made:
            if not made.done:
                time.sleep(0.5)
                with open(sys.argv[1] + "/result", "a") as file:
                    file.write("made\\n")
        """)
    command = [sys.executable, "-c", work, str(tmp_path / "out")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "out" / "result").read_text() == "made\n"


def test_a_directory_of_another_kind_of_step_is_not_cleared(tmp_path):
    """As a training's, where data are to be formatted to by mistake."""
    with Step(tmp_path / "a", {}, keep=True, lr=1, max_epoch=3):
        (tmp_path / "a" / "weeks.pth").write_text("of training")
    with pytest.raises(UserError, match="holds other files.*weeks.pth.: remove it"):
        with Step(tmp_path / "a", {}, fs=16000):
            pass
    assert (tmp_path / "a" / "weeks.pth").is_file()
    with Step(tmp_path / "b", {}, fs=16000):
        (tmp_path / "b" / "wav.scp").touch()
    with Step(tmp_path / "b", {}, fs=8000):
        assert not (tmp_path / "b" / "wav.scp").exists()
