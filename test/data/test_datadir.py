import pytest

from dldkit.bin.validate_data import main
from dldkit.data.datadir import (
    read_table,
    report_dropped,
    spk2utt,
    step_of,
    subset_data_dir,
    utterances,
    write_data_dir,
    write_table,
)
from dldkit.errors import UserError


@pytest.fixture
def directory(tmp_path):
    """A consistent directory of three utterances of two speakers."""
    write_data_dir(
        tmp_path / "set",
        "a corpus",
        wav_scp={"a-1": "a1.wav", "a-2": "a2.wav", "b-1": "b1.wav"},
        text={"a-1": "ONE", "a-2": "TWO TWO", "b-1": "THREE"},
        utt2spk={"a-1": "a", "a-2": "a", "b-1": "b"},
    )
    return tmp_path / "set"


def test_tables_are_sorted_as_the_c_locale_does(tmp_path):
    write_table(tmp_path / "t", {"b": "1", "B": "2", "é": "3", "a-1": "4", "a_1": "5"})
    keys = [line.split()[0] for line in (tmp_path / "t").read_text().splitlines()]
    assert keys == sorted(keys, key=lambda key: key.encode())
    assert keys == ["B", "a-1", "a_1", "b", "é"]


@pytest.mark.parametrize(
    "content, table",
    [
        ("a x y\nb z", {"a": "x y", "b": "z"}),  # LibriSpeech: no final newline
        ("a\tx  y \r\nb z\r\n", {"a": "x  y", "b": "z"}),
        ("", {}),
    ],
)
def test_read_table_takes_what_corpora_write(tmp_path, content, table):
    (tmp_path / "t").write_bytes(content.encode())
    assert read_table(tmp_path / "t") == table


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a x\na y\n", "line 2: a is there twice"),
        (b"a x\nb\n", "line 2: expected `key value`, got 'b'"),
        (b"a x\n\nb y\n", "line 2"),
        (b"a \xff\n", "not UTF-8"),
    ],
)
def test_read_table_names_the_bad_line(tmp_path, content, message):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t")


def test_empty_values_only_where_allowed(tmp_path):
    write_table(tmp_path / "text", {"a": "", "b": "B"})
    assert read_table(tmp_path / "text", allow_empty=True) == {"a": "", "b": "B"}
    with pytest.raises(UserError):
        read_table(tmp_path / "text")


def test_spk2utt():
    table = {"b-1": "b", "a-2": "a", "a-1": "a"}
    assert spk2utt(table) == {"a": "a-1 a-2", "b": "b-1"}


def test_consistent_directory(directory):
    assert utterances(directory) == ["a-1", "a-2", "b-1"]
    main([str(directory)])


@pytest.mark.parametrize("name", ["text", "utt2spk", "utt2speed", "wav.scp"])
@pytest.mark.parametrize("change", ["missing", "extra"])
def test_inconsistent_keys_are_refused(directory, name, change, capsys):
    full = {"a-1": "1.0", "a-2": "1.0", "b-1": "1.0"}
    table = full if name == "utt2speed" else read_table(directory / name)
    if change == "missing":
        del table["a-2"], table["b-1"]
        expected = "2 key(s)", "a-2 b-1"
    else:
        table["c-1"] = table["c-2"] = table["c-3"] = table["c-4"] = "1"
        expected = "4 key(s)", "first: c-1 c-2 c-3;"
    write_table(directory / name, table)
    with pytest.raises(SystemExit) as exit_:
        main([str(directory)])
    assert exit_.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {directory}") and name in error
    assert all(part in error for part in expected)


def test_stale_spk2utt_is_refused(directory):
    write_table(directory / "spk2utt", {"a": "a-1", "b": "b-1 a-2"})
    with pytest.raises(UserError, match="spk2utt"):
        utterances(directory)


@pytest.mark.parametrize("name", ["text", "utt2spk", "wav.scp"])
def test_missing_table_is_refused(directory, name):
    (directory / name).unlink()
    with pytest.raises(UserError, match=name):
        utterances(directory)


def test_segments_give_the_utterances(directory):
    write_table(directory / "wav.scp", {"rec": "rec.wav"})
    segments = {"a-1": "rec 0 1", "a-2": "rec 1 2", "b-1": "rec 2 3"}
    write_table(directory / "segments", segments)
    assert utterances(directory) == sorted(segments)
    write_table(directory / "segments", {**segments, "b-1": "other 2 3"})
    with pytest.raises(UserError, match="wav.scp lacks 1 key.*other"):
        utterances(directory)


def test_subset_keeps_the_source(directory, tmp_path):
    subset_data_dir(directory, tmp_path / "sub", ["b-1"])
    assert read_table(tmp_path / "sub" / "text") == {"b-1": "THREE"}
    assert read_table(tmp_path / "sub" / "spk2utt") == {"b": "b-1"}
    assert (tmp_path / "sub" / "corpus_source").read_text() == "a corpus\n"
    (directory / "corpus_source").write_text("a c\xf6rpus\n", encoding="latin1")
    with pytest.raises(UserError, match="corpus_source is not UTF-8 .*: convert it"):
        subset_data_dir(directory, tmp_path / "sub", ["b-1"])


def test_dropped_are_listed_and_all_is_too_many(tmp_path, caplog):
    report_dropped(tmp_path, {"b": "no samples", "a": "too long"}, total=3)
    assert (tmp_path / "dropped.txt").read_text() == "a too long\nb no samples\n"
    assert "dropped 2 of 3" in caplog.text
    with pytest.raises(UserError, match="no utterance is left.*too long"):
        report_dropped(tmp_path, {"a": "too long"}, total=1)


def test_step_of_knows_the_tables_by_content(directory):
    """What stages drop is their output, and no input of the next one."""
    out = directory.parent / "out"

    def is_done(**options):
        return step_of(directory, out, **options).is_done()

    with step_of(directory, out, fs=8000):
        pass
    assert is_done(fs=8000) and not is_done(fs=16000)
    (directory / "text").touch()
    (directory / "dropped.txt").write_text("a reason\n")
    assert is_done(fs=8000)
    text = (directory / "text").read_text()
    (directory / "text").write_text(text.replace("ONE", "SIX"))  # of equal size
    assert not is_done(fs=8000)
