"""Directories without transcripts: taken when they are asked for, and only then."""

import shutil

import pytest

from dldkit.bin import filter_data, format_data, validate_data
from dldkit.data.datadir import read_table, write_table

COMMANDS = (format_data, filter_data, validate_data)


@pytest.fixture
def audio(an4, tmp_path):
    """Four real utterances, 16 kHz, without `text`."""
    directory = shutil.copytree(an4 / "train_nodev", tmp_path / "audio")
    (directory / "text").unlink()
    return directory


@pytest.mark.parametrize("command", COMMANDS, ids=lambda m: m.__name__.split(".")[-1])
def test_a_missing_text_is_refused_unless_it_is_asked_for(
    command, audio, tmp_path, capsys
):
    words = [str(audio)] + [str(tmp_path / "out")] * (command is not validate_data)
    words += ["--fs", "16000"] * (command is filter_data)
    with pytest.raises(SystemExit):
        command.main(words)
    message = capsys.readouterr().err
    assert f"{audio / 'text'} does not exist" in message and "--no_text" in message
    if command is not filter_data:  # which takes what format_data wrote
        command.main([*words, "--no_text"])


def test_all_audio_arrives_without_text(audio, tmp_path):
    formatted, kept = tmp_path / "formatted", tmp_path / "kept"
    format_data.main([str(audio), str(formatted), "--no_text"])
    options = ["--no_text", "--fs", "16000", "--max_length", "100"]
    filter_data.main([str(formatted), str(kept), *options])
    validate_data.main([str(kept), "--no_text"])
    for directory in (formatted, kept):
        assert not (directory / "text").exists()
        for name in ("wav.scp", "utt2spk", "utt2num_samples"):
            assert set(read_table(directory / name)) == set(
                read_table(audio / "wav.scp")
            )


def test_length_counts_without_text(audio, tmp_path):
    format_data.main([str(audio), str(tmp_path / "formatted"), "--no_text"])
    sizes = read_table(tmp_path / "formatted" / "utt2num_samples")
    seconds = {utt: int(size) / 16000 for utt, size in sizes.items()}
    longest = max(seconds, key=seconds.get)
    limit = str(seconds[longest] - 0.01)
    words = [str(tmp_path / "formatted"), str(tmp_path / "kept"), "--no_text"]
    filter_data.main([*words, "--fs", "16000", "--max_length", limit])
    assert set(read_table(tmp_path / "kept" / "wav.scp")) == {*seconds} - {longest}


def test_a_text_that_is_there_is_kept_even_where_it_is_empty(an4, tmp_path):
    audio = shutil.copytree(an4 / "train_nodev", tmp_path / "audio")
    text = read_table(audio / "text")
    text[min(text)] = ""
    write_table(audio / "text", text)
    outcomes = {}
    for name, option in (("asked", ["--no_text"]), ("not", [])):
        format_data.main([str(audio), str(tmp_path / name), *option])
        outcomes[name] = read_table(tmp_path / name / "text", allow_empty=True)
    assert outcomes["asked"] == text
    assert outcomes["not"] == {utt: words for utt, words in text.items() if words}


def test_a_text_that_does_not_agree_is_refused_all_the_same(an4, tmp_path, capsys):
    audio = shutil.copytree(an4 / "train_nodev", tmp_path / "audio")
    write_table(audio / "text", {"other": "HELLO"})
    with pytest.raises(SystemExit):
        validate_data.main([str(audio), "--no_text"])
    assert (
        "wav.scp lacks 1 key(s) that text has, first: other" in capsys.readouterr().err
    )


def test_a_directory_is_made_anew_when_the_option_changes(an4, tmp_path):
    audio = shutil.copytree(an4 / "train_nodev", tmp_path / "audio")
    text = read_table(audio / "text")
    write_table(audio / "text", {utt: "" if utt == min(text) else "A" for utt in text})
    words = [str(audio), str(tmp_path / "out")]
    format_data.main([*words, "--no_text"])
    format_data.main(words)
    assert min(text) not in read_table(tmp_path / "out" / "wav.scp")
