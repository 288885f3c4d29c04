import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModel, HubertConfig, HubertModel

from dldkit.bin.sfm_probe import main
from dldkit.data.datadir import write_data_dir
from dldkit.sfm.export import export_student
from dldkit.sfm.probe import _cached_states, classify, transcribe

WORDS = "ONE TWO THREE".split()
SPEAKERS = {"lo": 1.0, "hi": 1.5}


def tone(word: str, speaker: str, rng) -> np.ndarray:
    """A stand-in for a spoken digit: the word is the pitch's octave."""
    time = np.arange(rng.integers(3000, 4000)) / 16000
    pitch = 200 * SPEAKERS[speaker] * 3 ** WORDS.index(word)
    sound = 0.3 * np.sin(2 * np.pi * pitch * time)
    return (sound + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


def write(directory: Path, utterances, fs=16000) -> str:
    """Write (utterance, speaker, text, samples) as a data directory."""
    tables: dict = dict(wav_scp={}, text={}, utt2spk={})
    directory.mkdir()
    for utt, speaker, text, samples in utterances:
        file = directory / f"{utt}.wav"
        soundfile.write(file, samples, fs)
        for table, value in zip(tables.values(), (file, text, speaker)):
            table[utt] = value
    write_data_dir(directory, **tables)
    return str(directory)


def untrained(directory: Path, seed: int = 0, **options) -> str:
    torch.manual_seed(seed)
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, conv_dim=[16] * 7)
    sizes.update(hidden_size=32, intermediate_size=32, num_conv_pos_embeddings=8)
    model = HubertModel(HubertConfig(**{**sizes, **options}))
    export_student(model, False, range(model.config.num_hidden_layers), directory)
    return str(directory)


@pytest.fixture
def data(tmp_path):
    """--digits and --strings: few tones, and strings of two."""
    rng, options = np.random.default_rng(0), []
    pairs = [(w, s) for w in WORDS for s in SPEAKERS]
    for name, takes in (("digits_train", 12), ("digits_test", 1)):
        utts = [
            (f"{s}-{w}-{take:02}", s, w, tone(w, s, rng))
            for w, s in pairs
            for take in range(takes)
        ]
        options.append(write(tmp_path / name, utts))
    for name in ("strings_train", "strings_test"):
        utts = [
            (
                f"{s}-{w}-{v}",
                s,
                f"{w} {v}",
                np.concatenate([tone(x, s, rng) for x in (w, v)]),
            )
            for w, s in pairs
            for v in WORDS
        ]
        options.append(write(tmp_path / name, utts))
    return ["--digits", *options[:2], "--strings", *options[2:]]


@pytest.fixture
def probe(data, tmp_path):
    """Run the command; return the report."""

    def run(*options: str) -> dict:
        output_dir = tmp_path / "probe"
        main([*data, "--output_dir", str(output_dir), *options])
        return json.loads((output_dir / "probe.json").read_text())

    return run


def synthetic(labels, informed: int, seed: int):
    """States (3, 8) of noise; in one layer they tell the label."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(labels), 3, 8, generator=generator)
    for state, label in zip(states, labels):
        state[informed, int(label)] += 9
    return list(states)


@pytest.mark.parametrize("informed", [0, 2])
def test_a_class_is_found_in_whichever_layer_tells_it(informed):
    train, test = "0123" * 15, "3210" * 10
    labels = [{f"u{i:02}": label for i, label in enumerate(s)} for s in (train, test)]
    told = [synthetic(s, informed, seed) for seed, s in enumerate((train, test))]
    assert classify(told, labels, 0) > 95
    # a state that tells nothing gives chance, and the truth decides what is right
    noise = [
        synthetic(s, informed, seed) for seed, s in enumerate(("0" * 60, "0" * 40))
    ]
    assert classify(noise, labels, 0) < 50
    wrong = [labels[0], {utt: "0" for utt in labels[1]}]
    assert classify(told, wrong, 0) == pytest.approx(25, abs=5)


def test_strings_are_found_and_their_errors_are_words():
    """Each word is two or three frames; the frames between the words are blank."""

    def frames(text, seed):
        generator = torch.Generator().manual_seed(seed)
        units = []
        for word in text.split():
            units += [3] + [WORDS.index(word)] * (2 + seed % 2)
        states = 0.3 * torch.randn(len(units) + 1, 3, 8, generator=generator)
        for state, unit in zip(states, [*units, 3]):
            state[1, unit] += 3
        return states.half()

    rng = np.random.default_rng(0)
    texts = [
        {f"u{i:03}": " ".join(rng.choice(WORDS, rng.integers(1, 5))) for i in range(n)}
        for n in (120, 10)
    ]
    texts[1]["u000"] = "ONE ONE TWO"  # the blank between equal words is found
    states = [[frames(t, i) for i, t in enumerate(part.values())] for part in texts]
    assert transcribe(states, texts, 0) == 0
    words = sum(len(text.split()) for text in texts[1].values())
    texts[1]["u000"] = "ONE TWO"  # an insertion
    assert transcribe(states, texts, 0) == pytest.approx(100 / (words - 1))


def test_a_probe_is_repeatable_and_leaves_random_numbers_alone():
    labels = [dict(enumerate("0123" * 5))] * 2
    states = [synthetic("0" * 20, 0, seed) for seed in (0, 1)]
    torch.manual_seed(5)
    first = classify(states, labels, 1)
    drawn = torch.rand(1)
    assert classify(states, labels, 1) == first
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert len({classify(states, labels, seed) for seed in range(5)}) > 1


def test_the_hidden_states_are_those_of_the_model(probe, tmp_path):
    path = untrained(tmp_path / "hf", do_stable_layer_norm=True)  # not normalised
    probe("--upstream", f"a={path}")
    kept = torch.load(tmp_path / "probe" / "hidden" / "a" / "states.pt")
    assert [len(part) for part in kept] == [72, 6, 18, 18]
    model = AutoModel.from_pretrained(path)
    for part, name, utt in ((0, "digits_train", 0), (3, "strings_test", 17)):
        file = sorted((tmp_path / name).glob("*.wav"))[utt]
        speech = torch.from_numpy(soundfile.read(file, dtype="float32")[0])[None]
        with torch.no_grad():
            states = model(speech, output_hidden_states=True).hidden_states
        expected = torch.stack(states, 2)[0]  # (Time, Layers, Dim)
        expected = expected - expected.mean(-1, keepdim=True)
        expected = expected / expected.std(-1, keepdim=True, correction=0)
        if part < 2:
            expected = expected.mean(0)
        torch.testing.assert_close(
            kept[part][utt].float(), expected, atol=2e-3, rtol=2e-3
        )


def test_a_row_per_model_and_the_spread_of_the_probes(probe, tmp_path, capsys):
    """Even random layers tell a low tone from a high one."""
    a, b = (untrained(tmp_path / name, seed) for seed, name in enumerate("ab"))
    report = probe("--upstream", f"a={a}", f"b={b}", "--seeds", "0 1")
    out = capsys.readouterr().out
    assert "not SUPERB" in out and "6 test recordings" in out
    assert "18 test strings of 36 digits" in out
    assert out.strip() == (
        (tmp_path / "probe" / "RESULTS.md").read_text().split("\n\nMade")[0].strip()
    )
    number = r"\d+\.\d ± \d+\.\d"
    for name in "ab":
        assert re.search(rf"^\| {name} *(\| +{number} ){{3}}\|$", out, re.M)
        scores = report["upstreams"][name]
        assert len(scores["digit_accuracy"]) == len(scores["digit_string_wer"]) == 2
        assert min(scores["digit_accuracy"]) > 60
    assert report["test_items"] == {"digits": 6, "strings": 18, "words": 36}
    assert probe("--upstream", f"a={a}", "--seeds", "0 1")["upstreams"]["a"] == (
        report["upstreams"]["a"]
    )


def test_hidden_states_are_kept_until_model_or_data_change(probe, data, tmp_path):
    path, options = untrained(tmp_path / "hf"), ["--upstream", f"a={tmp_path / 'hf'}"]
    probe(*options)
    cache = tmp_path / "probe" / "hidden" / "a" / "states.pt"

    def kept():
        return torch.load(cache)[1][0]

    first, stored = kept(), torch.load(cache)
    stored[1][0] = first + 1
    torch.save(stored, cache)
    probe(*options)
    assert torch.equal(kept(), first + 1)  # from the cache

    untrained(Path(path), seed=1)
    probe(*options)
    second = kept()
    assert not torch.equal(second, first) and not torch.equal(second, first + 1)

    test_dir = Path(data[2])
    file = sorted(test_dir.glob("*.wav"))[0]
    other = tmp_path / "other.wav"
    soundfile.write(other, 0.1 * np.random.default_rng(0).standard_normal(4000), 16000)
    table = (test_dir / "wav.scp").read_text()
    (test_dir / "wav.scp").write_text(table.replace(str(file), str(other)))
    probe(*options)
    assert not torch.equal(kept(), second)


def test_one_set_may_be_of_digits_and_of_strings(data, tmp_path):
    """As it is used, and not its name, says whether the mean over time is wanted."""
    digits, strings = (data[1], data[2]), (data[1], data[2])
    path = untrained(tmp_path / "hf")
    states = _cached_states(path, digits, strings, tmp_path / "cache", "cpu")
    assert [part[0].dim() for part in states] == [2, 2, 3, 3]


def spoil(data, what: str) -> None:
    digits_train, digits_test, strings_test = map(Path, (data[1], data[2], data[5]))
    lines = {
        "two words": (digits_test / "text", " TWO\n", " TWO ONE\n"),
        "unknown word": (strings_test / "text", " THREE\n", " FOUR\n"),
        "unknown speaker": (digits_train / "utt2spk", " hi\n", " lo\n"),
        "utterances": (digits_test / "text", "hi-ONE-00 ", "hi-ONE-99 "),
        "no audio": (strings_test / "wav.scp", "lo-TWO-TWO.wav", "lo-TWO-TWO.flac"),
    }
    if what == "rate":
        write(digits_test.with_name("slow"), [("u", "lo", "ONE", np.zeros(4000))], 8000)
        data[2] = str(digits_test.with_name("slow"))
    elif what == "no text":
        (strings_test / "text").unlink()
    else:
        file, old, new = lines[what]
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "what, message",
    [
        ("two words", "digits_test/text: utterance hi-TWO-00 has 2 words; --digits"),
        ("unknown word", "strings_test/text has FOUR, which .*strings_train has not"),
        ("unknown speaker", "digits_test/utt2spk has hi, which .*digits_train has not"),
        ("utterances", r"text and wav.scp have different utterances \(hi-ONE-00\)"),
        ("no audio", "strings_test: utterance lo-TWO-TWO: no such file"),
        ("rate", "slow: utterance u has 8000 Hz, but the model takes 16000 Hz"),
        ("no text", "strings_test/text does not exist"),
    ],
)
def test_refuses_data_that_do_not_fit(probe, data, tmp_path, capsys, what, message):
    spoil(data, what)
    with pytest.raises(SystemExit):
        probe("--upstream", f"a={untrained(tmp_path / 'hf')}")
    assert re.search(f"^error: .*{message}", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--upstream", "full"], "--upstream full: write NAME=PATH"),
        (["--upstream", "a/b=c"], "--upstream a/b=c: write NAME=PATH"),
        (["--upstream", "a=b", "--upstream", "a=c"], "the name a stands there twice"),
        (["--upstream", "a=b", "--seeds", "x"], "argument --seeds: 'x': write numbers"),
        (["--upstream", "a=."], "no teacher in ."),
        (["--upstream", "a=b", "--device", "gpu"], "argument --device: invalid choice"),
    ],
)
def test_refuses_impossible_options(probe, capsys, options, message):
    with pytest.raises(SystemExit):
        probe(*options)
    assert f"error: {message}" in capsys.readouterr().err.replace("--upstream: ", "")


@pytest.mark.integration
@pytest.mark.skipif(
    not {"FSDD", "TEACHER"} <= set(os.environ), reason="needs FSDD and TEACHER"
)
def test_tells_a_pretrained_model_from_an_untrained_one(tmp_path):
    """On real digits of two speakers."""
    recordings = Path(os.environ["FSDD"]) / "recordings"
    digits = dict(
        enumerate("ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split())
    )
    speakers = ("jackson", "theo")

    def recording(digit, speaker, take):
        samples = soundfile.read(recordings / f"{digit}_{speaker}_{take}.wav")[0]
        return np.interp(np.arange(0, len(samples), 0.5), range(len(samples)), samples)

    def singles(takes):
        return [
            (f"{s}-{d}-{take}", s, digits[d], recording(d, s, take))
            for s in speakers
            for d in digits
            for take in takes
        ]

    def strings(take):
        return [
            (
                f"{s}-{d}",
                s,
                f"{digits[d]} {digits[9 - d]}",
                np.concatenate([recording(d, s, take), recording(9 - d, s, take)]),
            )
            for s in speakers
            for d in digits
        ]

    data = ["--digits", write(tmp_path / "a", singles(range(5, 9)))]
    data += [write(tmp_path / "b", singles(range(2)))]
    data += [
        "--strings",
        write(
            tmp_path / "c", strings(5) + [(f"{u}x", *rest) for u, *rest in strings(6)]
        ),
        write(tmp_path / "d", strings(0)),
    ]
    options = [*data, "--output_dir", str(tmp_path / "probe"), "--upstream"]
    hf = untrained(tmp_path / "hf", hidden_size=96, num_hidden_layers=4)
    main([*options, f"teacher={os.environ['TEACHER']}", f"untrained={hf}"])
    report = json.loads((tmp_path / "probe" / "probe.json").read_text())
    teacher, untrained_ = (report["upstreams"][n] for n in ("teacher", "untrained"))
    assert teacher["digit_accuracy"][0] > untrained_["digit_accuracy"][0] + 20
    assert teacher["digit_string_wer"][0] < untrained_["digit_string_wer"][0] - 20
