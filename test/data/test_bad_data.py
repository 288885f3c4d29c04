"""Each corpus in its real layout, made small from real recordings, and spoilt.

What is bad is named: it is dropped and listed, or refused. The rest is used.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
from layouts import CORPORA, RATE, WORDS, tedlium3, write

import dldkit.data.from_lhotse as from_lhotse_module
from dldkit.data.corpus import corpus_parser
from dldkit.data.datadir import read_table, utterances
from dldkit.data.format import Format, format_data


@pytest.fixture(params=["librispeech_100", "tedlium3", "an4", "commonvoice", "aishell"])
def corpus(request, recipe, speech, tmp_path, monkeypatch):
    """A corpus in a directory with spaces and Unicode in its name; stages 1 and 3."""
    layout = CORPORA[request.param](tmp_path / "my córpus 語料" / "x", speech)
    monkeypatch.setenv(layout.variable, str(layout.home))
    module = recipe(request.param)
    if request.param == "an4":
        monkeypatch.setattr(module, "DEV", 1)
    words = ["--data_dir", str(tmp_path / "data")]
    words += ["--download_dir", str(tmp_path / "downloads")]
    words += ["--lang", "cy"] if request.param == "commonvoice" else []
    layout.name, layout.data = request.param, tmp_path / "data"
    layout.prepare = lambda: module.main(words)
    layout.format = lambda name, **how: format_data(
        tmp_path / "data" / name, tmp_path / "dump" / name, Format(**how)
    )
    layout.dump = tmp_path / "dump" / layout.train
    return layout


def flat(ids):
    return sorted(utt for utts in ids for utt in utts)


# ---------------------------------------------------------------- what is right


def test_a_sound_corpus_comes_out_sample_by_sample(corpus, speech):
    corpus.prepare()
    for directory in corpus.data.iterdir():
        assert utterances(directory)
    corpus.format(corpus.train)
    wavs = read_table(corpus.dump / "wav.scp")
    assert sorted(wavs) == flat(corpus.ids)
    text = read_table(corpus.dump / "text")
    for utts, samples, path in zip(corpus.ids, speech, corpus.audio):
        if corpus.name == "tedlium3":  # padded: 0.15 s before, 0.1 s after, not over
            first, second = (soundfile.read(wavs[u], dtype="int16")[0] for u in utts)
            np.testing.assert_array_equal(first, samples[: int(0.4 * RATE)])
            end = int(0.8 * RATE)
            np.testing.assert_array_equal(second, samples[int(0.4 * RATE) : end])
            assert text[utts[0]] == "they're here [NOISE] [unk]"
            assert text[utts[1]] == "it's"
        else:
            truth = samples
            if path.suffix == ".mp3":
                # libsndfile by itself keeps the delay of the decoder
                truth = soundfile.read(path, dtype="float32")[0][529:]
                truth = np.clip(np.round(truth * 32768), -32768, 32767)
            got, rate = soundfile.read(wavs[utts[0]], dtype="int16")
            assert rate == RATE
            np.testing.assert_array_equal(got, truth)
    texts = {
        "librispeech_100": WORDS,
        "an4": WORDS,
        "commonvoice": [f"“{words}” Ŵ" for words in WORDS],
        "aishell": ["广州市房0", "广州市房1", "广州市房2"],
    }
    if corpus.name in texts:
        assert [text[utts[0]] for utts in corpus.ids] == texts[corpus.name]


def test_sets_are_espnet_s(corpus):
    corpus.prepare()
    sizes = {path.name: len(utterances(path)) for path in corpus.data.iterdir()}
    three = dict.fromkeys
    assert (
        sizes
        == {
            "librispeech_100": {
                "train_clean_100": 3,
                **three("dev_clean dev_other test_clean test_other".split(), 3),
                "dev": 6,
            },
            "tedlium3": three(["train", "dev", "test"], 6),
            "an4": {"train_nodev": 3, "train_dev": 1, "test": 4},
            "commonvoice": three(["train_cy", "dev_cy", "test_cy"], 3),
            "aishell": three(["train", "dev", "test"], 3),
        }[corpus.name]
    )


# ---------------------------------------------------------------- what is not


def truncate(corpus, path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])


def double(corpus, path):
    if corpus.name == "tedlium3":  # whose lines have no ids: another text, same times
        other = corpus.line.replace("it 's", "it was")
        corpus.transcript.write_text(f"{corpus.transcript.read_text()}{other}\n")
    else:
        corpus.replace(corpus.line, f"{corpus.line}\n{corpus.line}".encode())


def same_file_twice(corpus, path):
    copy = path.parent.with_name(path.parent.name + "_copy") / path.name
    if corpus.name in ("tedlium3", "commonvoice"):  # which have one folder for all
        pytest.skip("two files can not have one name")
    write(copy, soundfile.read(path, dtype="int16")[0])


NOISE = np.random.default_rng(0).integers(-3000, 3000, RATE).astype(np.int16)
# what is done, what is expected, and by corpus what else: `kept`, `listed REASON` of
# stage 1 or 3, or `refused MESSAGE`
DEFECTS: dict[str, tuple[Callable, str, dict[str, str]]] = {
    "truncated": (truncate, "listed truncated|unreadable", {}),
    "empty file": (lambda c, p: p.write_bytes(b""), "listed unreadable", {}),
    "no audio file": (
        lambda c, p: p.write_text("<html>404</html>" * 99),
        "listed unreadable|no samples",
        {},
    ),
    "zero length": (
        lambda c, p: write(p, NOISE[:0]),
        "listed no samples|unreadable",
        {},
    ),
    "silent": (lambda c, p: write(p, NOISE * 0), "listed silent: its", {}),
    "missing transcript": (
        lambda c, p: c.replace(c.line + "\n", b""),
        "listed no transcript",
        # clips that are in no table are usual there, and talks need no further line
        {"commonvoice": "gone", "tedlium3": "gone"},
    ),
    "empty transcript": (
        lambda c, p: c.replace(c.line, c.empty.encode()),
        "listed empty transcript",
        {},
    ),
    "transcript without audio": (
        lambda c, p: p.unlink(),
        "listed no audio",
        {"tedlium3": "refused TrainSpeaker1_2014"},
    ),
    "duplicate id": (
        double,
        "refused {id} is there twice: line .* and line",
        {"tedlium3": "refused two texts for {id}"},
    ),
    "two files of one name": (same_file_twice, "refused {stem} is there twice", {}),
    "not UTF-8": (
        lambda c, p: c.replace(c.line, c.line.encode() + " é".encode("latin1")),
        "refused {transcript}, line [0-9]+: it is not UTF-8",
        {},
    ),
    "another rate": (
        lambda c, p: write(p, NOISE, 8000),
        "kept 1 utterance.s. resampled from 8000 Hz to 16000 Hz",
        {"tedlium3": "kept 2 utterance.s. resampled from 8000 Hz to 16000 Hz"},
    ),
    "stereo": (
        lambda c, p: write(p, np.stack([NOISE, NOISE[::-1]], 1)),
        "kept 1 utterance.s. with 2 channels, mixed to one",
        {"tedlium3": "kept 2 utterance.s. with 2 channels, mixed to one"},
    ),
}


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_bad_data_is_named_and_survived(corpus, defect, caplog, capsys):
    caplog.set_level("INFO")
    spoil, usual, others = DEFECTS[defect]
    kind, _, pattern = others.get(corpus.name, usual).partition(" ")
    spoil(corpus, corpus.audio[1])
    victims = corpus.ids[1]
    if corpus.name == "tedlium3" and "transcript" in defect:
        victims = victims[1:]  # the line of one segment
    pattern = pattern.format(
        id=re.escape(corpus.audio[1].stem if kind == "refused" else victims[0]),
        stem=re.escape(corpus.audio[1].stem),
        transcript=re.escape(str(corpus.transcript)),
    )
    if kind == "refused":
        with pytest.raises(SystemExit):
            corpus.prepare()
        assert re.search(f"error: .*{pattern}", capsys.readouterr().err)
        return
    corpus.prepare()
    corpus.format(corpus.train)
    kept = sorted(read_table(corpus.dump / "wav.scp"))
    assert sorted(read_table(corpus.dump / "text")) == kept
    if kind == "kept":
        assert kept == flat(corpus.ids)
        assert re.search(pattern, caplog.text)
        return
    assert kept == sorted(set(flat(corpus.ids)) - set(victims))
    lists = [corpus.data / corpus.train / "dropped.txt", corpus.dump / "dropped.txt"]
    listed = {k: v for path in lists for k, v in read_table(path).items()}
    if kind == "listed":
        for victim in victims:
            keys = [victim, corpus.audio[1].stem]
            reason = next(listed[key] for key in keys if key in listed)
            assert re.search(pattern, reason)
        assert f"dropped {len(victims)} of" in caplog.text


def test_an_interrupted_preparation_is_done_again_and_a_finished_one_kept(
    corpus, monkeypatch
):
    def dying(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(from_lhotse_module, "write_data_dir", dying)
        with pytest.raises(KeyboardInterrupt):
            corpus.prepare()
    corpus.prepare()
    text = corpus.data / corpus.train / "text"
    assert utterances(text.parent) == flat(corpus.ids)
    before = text.stat().st_mtime_ns
    corpus.prepare()
    assert text.stat().st_mtime_ns == before
    corpus.replace(corpus.line, corpus.empty.encode())
    corpus.prepare()
    assert text.stat().st_mtime_ns != before


@pytest.mark.parametrize("variable", ["", "downloads", "/nowhere/at/all"])
def test_a_missing_corpus_says_what_to_set(corpus, variable, monkeypatch, capsys):
    monkeypatch.setenv(corpus.variable, variable)

    def unreachable(*args, **kwargs):
        raise OSError("no way there")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(SystemExit):
        corpus.prepare()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and corpus.variable in said


def test_no_download_is_advised_where_there_is_none(
    recipe, speech, tmp_path, monkeypatch, capsys
):
    layout = CORPORA["commonvoice"](tmp_path, speech)
    monkeypatch.setenv("COMMONVOICE", str(layout.home))
    layout.transcript.with_name("dev.tsv").unlink()
    with pytest.raises(SystemExit):
        recipe("commonvoice").main(["--lang", "cy"])
    said = capsys.readouterr().err
    assert said.endswith("lacks cy/dev.tsv: complete the corpus\n")


def test_the_jobs_and_the_language_of_run_sh_count(recipe, monkeypatch, capsys):
    for name, value in (("NJ", "3"), ("LANG", "cy")):
        monkeypatch.setenv(f"DLDKIT_{name}", value)
    monkeypatch.setenv("COMMONVOICE", "")
    with pytest.raises(SystemExit):
        recipe("commonvoice").main(["--data_dir", "x"])
    assert "language cy at" in capsys.readouterr().err
    assert corpus_parser("", nj=2).parse_args([]).nj == 3
    assert recipe("espeak_words").get_parser().parse_args([]).nj == 3


def test_a_line_that_is_there_twice_is_used_once(recipe, speech, tmp_path, monkeypatch):
    layout = tedlium3(tmp_path, speech)
    layout.replace(layout.line, f"{layout.line}\n{layout.line}".encode())
    monkeypatch.setenv("TEDLIUM3", str(tmp_path))
    recipe("tedlium3").main(["--data_dir", str(tmp_path / "data")])
    assert utterances(tmp_path / "data" / "train") == flat(layout.ids)
    dropped = read_table(tmp_path / "data" / "train" / "dropped.txt")
    twice = f"the same line as {layout.ids[1][1]}"
    assert dropped.pop("TrainSpeaker1_2014-3") == twice
    assert set(dropped.values()) == {"ignore_time_segment_in_scoring"}
