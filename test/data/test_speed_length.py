import shutil

import pytest

from dldkit.bin.filter_data import main as filter_main
from dldkit.bin.perturb_speed import main as speed_main
from dldkit.data.datadir import read_table, utterances, write_table
from dldkit.data.format import Format, format_data
from dldkit.data.length import filter_data
from dldkit.errors import UserError


def test_speed_makes_new_utterances_of_new_speakers(an4, tmp_path):
    src, dst = an4 / "train_nodev", tmp_path / "sp"
    speed_main(["--factors", "0.9 1.0 1.1", str(src), str(dst)])
    old = utterances(src)
    assert utterances(dst) == sorted(
        prefix + utt for prefix in ("sp0.9-", "", "sp1.1-") for utt in old
    )
    speeds, speakers = (read_table(dst / n) for n in ("utt2speed", "utt2spk"))
    for utt in old:
        assert [speeds[p + utt] for p in ("sp0.9-", "", "sp1.1-")] == [
            "0.9",
            "1.0",
            "1.1",
        ]
        assert speakers["sp0.9-" + utt] == "sp0.9-" + speakers[utt]
        assert read_table(dst / "text")["sp1.1-" + utt] == read_table(dst / "text")[utt]
    assert (dst / "corpus_source").read_text() == (src / "corpus_source").read_text()


def test_speeds_are_kept_until_the_data_change(an4, tmp_path):
    src, dst = tmp_path / "src", tmp_path / "sp"
    shutil.copytree(an4 / "train_nodev", src)
    speed_main(["--factors", "0.9 1.0", str(src), str(dst)])
    made = (dst / "wav.scp").stat().st_mtime_ns
    speed_main(["--factors", "0.9 1.0", str(src), str(dst)])
    assert (dst / "wav.scp").stat().st_mtime_ns == made
    text = read_table(src / "text")
    utt = min(text)
    write_table(src / "text", {**text, utt: "SOMETHING ELSE"})
    speed_main(["--factors", "0.9 1.0", str(src), str(dst)])
    assert read_table(dst / "text")["sp0.9-" + utt] == "SOMETHING ELSE"
    with pytest.raises(SystemExit):  # someone's own directory is not overwritten
        speed_main([str(src), str(an4 / "test")])
    assert not (an4 / "test" / "utt2speed").exists()


@pytest.mark.parametrize("factors", ["0", "-1", "fast", "nan"])
def test_bad_factors_are_refused(an4, tmp_path, capsys, factors):
    with pytest.raises(SystemExit):
        speed_main(["--factors", factors, str(an4 / "test"), str(tmp_path / "sp")])
    assert f"error: speed factor '{factors}'" in capsys.readouterr().err


@pytest.fixture(params=["raw", "fbank"])
def formatted(request, an4, tmp_path):
    """Four real utterances; `scale` turns seconds into the unit of their length."""
    format_data(an4 / "train_nodev", tmp_path / "org", Format(request.param))
    return tmp_path / "org", 1 if request.param == "raw" else 100


def test_length_filter(formatted, tmp_path, caplog):
    src, scale = formatted
    # 0.7 s, 1.0 s, 2.5 s, 2.8 s of speech
    bounds = ["--min_length", str(0.8 * scale), "--max_length", str(2.7 * scale)]
    filter_main([*bounds, "--fs", "16000", str(src), str(tmp_path / "out")])
    kept = ["fash-an251-fash-b", "fash-cen7-fash-b"]
    assert utterances(tmp_path / "out") == kept
    dropped = read_table(tmp_path / "out" / "dropped.txt")
    assert "shorter" in dropped["fash-an253-fash-b"]
    assert "longer" in dropped["fbbh-cen8-fbbh-b"]
    assert "dropped 2 of 4" in caplog.text
    for name in ("feats_type", "corpus_source", *["feats_dim"] * (scale > 1)):
        assert (tmp_path / "out" / name).read_text() == (src / name).read_text()


@pytest.mark.parametrize("bounds", [("nan", "3"), ("0", "nan"), ("2", "1")])
def test_impossible_bounds_are_refused(an4, tmp_path, bounds):
    with pytest.raises(UserError, match="max_length .*: choose two numbers"):
        filter_data(an4 / "test", tmp_path / "out", *map(float, bounds), 16000)


def test_a_length_that_is_no_number_is_refused(formatted, tmp_path):
    src, scale = formatted
    table = src / ("utt2num_samples" if scale == 1 else "feats_shape")
    write_table(table, {**read_table(table), "fash-an251-fash-b": "long"})
    with pytest.raises(UserError, match="'long' of fash-an251-fash-b is no length"):
        filter_data(src, tmp_path / "out", 0, 1e9, 16000)


def test_length_filter_drops_empty_text_and_refuses_nothing_left(formatted, tmp_path):
    src, _ = formatted
    text = read_table(src / "text")
    write_table(src / "text", {**text, "fash-an251-fash-b": ""})
    filter_data(src, tmp_path / "out", 0, 1e9, 16000)
    assert "fash-an251-fash-b" not in utterances(tmp_path / "out")
    with pytest.raises(UserError, match="no utterance is left"):
        filter_data(src, tmp_path / "none", 1e6, 1e9, 16000)
