import pytest
import soundfile

from dldkit.data.datadir import read_table, utterances
from dldkit.errors import UserError

SETS = {"train_nodev": 4, "train_dev": 2, "test": 2}


def test_eight_recordings_in_disjoint_sets(an4):
    wavs, speakers = [], []
    for name, size in SETS.items():
        assert len(utterances(an4 / name)) == size
        wavs += read_table(an4 / name / "wav.scp").values()
        speakers += set(read_table(an4 / name / "utt2spk").values())
        assert "AN4" in (an4 / name / "corpus_source").read_text()
    assert len(set(wavs)) == 8
    assert len(set(speakers)) == len(speakers) == 5
    for path in wavs:
        info = soundfile.info(path)
        assert info.samplerate == 16000 and info.frames > 0


def test_transcripts_have_no_markup(an4):
    text = read_table(an4 / "test" / "text")
    assert text == {
        "fcaw-cen8-fcaw-b": "ELEVEN TWENTY SEVEN FIFTY SEVEN",
        "mmxg-cen8-mmxg-b": "OCTOBER TWENTY FOUR NINETEEN SEVENTY",
    }
    assert read_table(an4 / "train_nodev" / "text")["fash-an253-fash-b"] == "GO"


def test_espnet_without_the_archive_is_named(recipe, monkeypatch):
    module = recipe("mini_an4")
    monkeypatch.setattr(module, "ARCHIVE", "egs3/gone.tar.gz")
    with pytest.raises(UserError, match="espnet lacks egs3/gone.tar.gz"):
        module.find_archive()
