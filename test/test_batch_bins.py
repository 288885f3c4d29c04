"""An update learns from as much audio as in ESPnet, whose recipes have more units."""

import random
import re

import pytest
import yaml
from espnet2.samplers.num_elements_batch_sampler import NumElementsBatchSampler
from running import ROOT

# Tokens of a second of LibriSpeech, by the number of BPE units (at 14.5 characters).
TOKENS = {256: 6.1, 500: 4.9, 5000: 3.3}
TABLE = (ROOT / "egs2" / "README.md").read_text()


def config(recipe, name="train_asr"):
    path = ROOT / "egs2" / recipe / "asr1" / "conf" / f"{name}.yaml"
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Return a function that gives the seconds of audio in ESPnet's mean batch."""
    directory = tmp_path_factory.mktemp("shapes")
    draw = random.Random(0)
    # as in train-clean-100: most recordings were cut to 11 to 16.5 seconds
    spans = [(2, 11)] * 4 + [(11, 16.5)] * 15 + [(16.5, 24.5)]
    seconds = [draw.uniform(*draw.choice(spans)) for _ in range(20000)]
    speech, text = directory / "speech_shape", directory / "text_shape"
    lines = [f"{i} {int(s * 16000)}\n" for i, s in enumerate(seconds)]
    speech.write_text("".join(lines))

    def of_a_batch(bins, units):
        lines = [
            f"{i} {int(s * TOKENS[units])},{units}\n" for i, s in enumerate(seconds)
        ]
        text.write_text("".join(lines))
        batches = list(NumElementsBatchSampler(bins, [str(speech), str(text)]))
        padded = [len(batch) * max(seconds[int(u)] for u in batch) for batch in batches]
        return sum(padded) / len(batches)

    return of_a_batch


@pytest.mark.parametrize(
    "recipe, espnets, units",
    [
        ("librispeech_100", 16000000, 5000),
        ("librispeech", 35000000, 5000),
        ("tedlium3", 50000000, 500),
    ],
)
def test_batches_hold_as_much_audio_as_espnets(audio, recipe, espnets, units):
    bins = config(recipe)["batch_bins"]
    assert audio(bins, 256) == pytest.approx(audio(espnets, units), rel=0.05)


def test_wavlms_batches_hold_what_their_config_says(audio):
    bins = config("librispeech_100", "train_asr_wavlm")["batch_bins"]
    assert audio(bins, 256) == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize(
    "named, recipe, config_name",
    [
        ("librispeech_100", "librispeech_100", "train_asr"),
        (
            "librispeech_100, E-Branchformer .*",
            "librispeech_100",
            "train_asr_e_branchformer",
        ),
        ("librispeech_100, WavLM", "librispeech_100", "train_asr_wavlm"),
        ("librispeech", "librispeech", "train_asr"),
        ("tedlium3", "tedlium3", "train_asr"),
    ],
)
def test_other_gpus_keep_what_an_update_learns_from(named, recipe, config_name):
    own = config(recipe, config_name)
    (row,) = re.findall(rf"^\| {named} \| .*batch_bins.*$", TABLE, re.M)
    options = re.findall(r"--batch_bins (\d+) --accum_grad (\d+)", row)
    assert options
    for bins, accumulated in options:
        product = int(bins) * int(accumulated)
        assert product == own["batch_bins"] * own["accum_grad"]
