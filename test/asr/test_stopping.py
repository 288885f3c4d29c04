import math

"""Utterances that leave the encoder early, against the depths at which they left."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError

from dldkit.asr.calibration import write_depth_profile
from dldkit.asr.inference import Speech2Text
from dldkit.asr.stopping import entropy, thresholds_on
from dldkit.bin.asr_inference import main
from dldkit.depth.profile import DepthProfile, profile_path
from dldkit.depth.thresholds import choose_thresholds, mean_depth
from dldkit.errors import UserError

MODEL = "valid.loss_ctc.best.pth"
UTTS = "cafb"  # of four lengths
DEPTHS = (1, 2, 3, 4)
EXITS = dict(depth_sampler="uniform", layer_choice="prefix", exits=1)


@pytest.fixture
def recogniser(build, tmp_path):
    """Return a function that builds an untrained recogniser with exits."""

    def make(encoder="ld_conformer", encoder_conf=(), model_conf=(), **options):
        directory = tmp_path / "exp"
        if not directory.exists():
            model = build(
                directory=directory,
                encoder=encoder,
                encoder_conf={**EXITS, **dict(encoder_conf)},
                model="dld",
                model_conf={"reference": None, **dict(model_conf)},
            )
            with torch.no_grad():  # heads that are sure of some utterances only
                for name, weight in model.ctc.named_parameters():
                    if name.endswith("weight"):
                        weight.mul_(8)
            torch.save(model.state_dict(), directory / MODEL)
        return Speech2Text(directory / "config.yaml", directory / MODEL, **options)

    return make


@pytest.fixture
def speech(corpus):
    return [corpus.speech(utt) for utt in UTTS]


@torch.no_grad()
def at_depths(recogniser, speech):
    """What each utterance of a batch gives at each depth, and its entropy there.

    The entropies are computed in numpy; the rest is ours, without early stopping.
    """
    results, entropies = {}, np.zeros((len(speech), len(DEPTHS)))
    model = recogniser.asr_model
    for column, depth in enumerate(DEPTHS):
        recogniser.set_depth(depth)
        results[depth] = recogniser(speech)
        encoded, lengths = model.encode(**recogniser.padded(speech))
        for row, (frames, length) in enumerate(zip(encoded, lengths)):
            logits = model.ctc.ctc_lo(frames[:length]).double().numpy()
            posteriors = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            unsure = -(posteriors * np.log(posteriors)).sum(-1).mean()
            entropies[row, column] = unsure / np.log(logits.shape[-1])
    recogniser.set_depth(None)
    return results, entropies


def first_below(entropies, threshold, deepest=4):
    """The depth at which each utterance has to leave."""
    return [
        next((d for d in DEPTHS if row[d - 1] < threshold and d < deepest), deepest)
        for row in entropies
    ]


def assert_same(found, expected, depth):
    ((text, token, token_int, hypothesis),) = found
    assert (text, token, token_int) == expected[0][:3]
    assert hypothesis.score == pytest.approx(expected[0][3].score, rel=1e-4)
    assert hypothesis.yseq.tolist() == expected[0][3].yseq.tolist()
    assert hypothesis.depth == depth


@pytest.mark.parametrize("shared_head", [True, False])
def test_each_utterance_gets_what_its_depth_gives(
    recogniser, speech, encoder_name, encoder_sizes, shared_head
):
    """For each threshold that tells two (utterance, exit) apart; lengths are mixed."""
    speech2text = recogniser(
        f"ld_{encoder_name}", encoder_sizes, dict(shared_head=shared_head)
    )
    expected, entropies = at_depths(speech2text, speech)
    borders = np.sort(entropies[:, :3].flatten())
    seen = set()
    for threshold in [0.0, *(borders[1:] + borders[:-1]) / 2, 1.0]:
        depths = first_below(entropies, threshold)
        found = speech2text(speech, exit_threshold=threshold)
        for result, depth, i in zip(found, depths, range(4), strict=True):
            assert_same(result, expected[depth][i], depth)
        seen.add(tuple(depths))
    assert {(1,) * 4, (4,) * 4} < seen
    most = max(len(set(depths)) for depths in seen)  # in one batch
    assert most >= (2 if shared_head else 3)  # or little was tested
    texts = {tuple(r[0][2]) for results in expected.values() for r in results}
    assert len(texts) > 1  # scores differ everywhere


def test_layers_run_for_those_who_stay(recogniser, speech):
    speech2text = recogniser()
    _, entropies = at_depths(speech2text, speech)
    sizes = []
    for layer in speech2text.asr_model.encoder.gates.children():
        layer.register_forward_hook(lambda *hook: sizes.append(len(hook[2][1])))
    for threshold in (np.median(entropies[:, 0]), entropies[:, 0].max() + 0.01, 0.0):
        sizes.clear()
        speech2text(speech, exit_threshold=float(threshold))
        depths = first_below(entropies, threshold)
        expected = [sum(d > layer for d in depths) for layer in range(4)]
        assert sizes == [size for size in expected if size]
    assert sizes == [4, 4, 4, 4]


def test_not_deeper_than_the_depth(recogniser, speech):
    speech2text = recogniser(exit_threshold=0.0)
    expected, entropies = at_depths(recogniser(), speech)
    for depth in (3, 1):
        speech2text.set_depth(depth)
        for result, wanted in zip(speech2text(speech), expected[depth]):
            assert_same(result, wanted, depth)
    threshold = float(np.median(entropies[:, 0]))
    with speech2text.running(2):
        found = speech2text(speech, exit_threshold=threshold)
    depths = first_below(entropies, threshold, deepest=2)
    assert set(depths) == {1, 2}
    for i, depth in enumerate(depths):
        assert_same(found[i], expected[depth][i], depth)


def test_requests_in_threads_have_their_own_threshold(recogniser, speech):
    speech2text = recogniser()
    _, entropies = at_depths(speech2text, speech)

    def request(threshold):
        results = [speech2text(speech, exit_threshold=threshold) for _ in range(5)]
        return [[r[0][3].depth for r in result] for result in results]

    thresholds = (float(np.median(entropies[:, 0])), 0.0, None)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(request, thresholds))
    assert found[0] == [first_below(entropies, thresholds[0])] * 5
    assert found[1] == found[2] == [[4] * 4] * 5


@pytest.mark.parametrize("beam_size", [1, 2])
def test_requests_in_threads_do_not_mix(recogniser, speech, beam_size):
    """ESPnet's attention writes its weights into the module and reads them again."""
    speech2text = recogniser(beam_size=beam_size)
    alone = [speech2text(utterance)[0] for utterance in speech]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(speech2text, speech[i % 4]) for i in range(40)]
        for i, job in enumerate(jobs):
            assert job.result()[0][:3] == alone[i % 4][:3]
            assert float(job.result()[0][3].score) == float(alone[i % 4][3].score)


class TestDepthProfile:
    @pytest.fixture
    def calibrated(self, recogniser, corpus, tmp_path):
        """Return a function that calibrates depths, and the recogniser with them."""

        def make(depths):
            recogniser()
            write_depth_profile(tmp_path / "exp" / MODEL, corpus.train, depths)
            return recogniser()

        return make

    @pytest.mark.parametrize(
        "depths, usable", [([4, 3, 2, 1], [1, 2, 3]), ([4, 2], [2]), ([3], [1, 2])]
    )
    def test_exits_are_what_their_depths_give(
        self, calibrated, speech, caplog, depths, usable
    ):
        """Where a depth has other statistics, no utterance leaves there."""
        speech2text = calibrated(depths)
        expected, entropies = at_depths(speech2text, speech)
        seen = set()
        for threshold in (*entropies[:, :3].flatten(), 1.0):
            for i, result in enumerate(speech2text(speech, exit_threshold=threshold)):
                depth = result[0][3].depth
                seen.add(depth)
                assert_same(result, expected[depth][i], depth)
        assert seen <= {*usable, 4} and min(usable) in seen
        lost = sorted({1, 2, 3} - set(usable))
        warned = [m for m in caplog.messages if "is no exit on the way to 4" in m]
        assert [int(m.split()[1]) for m in warned] == lost  # each once

    def test_refused_statistics_are_no_exit_either(self, calibrated, tmp_path):
        calibrated([4, 2, 1])
        path = profile_path(tmp_path / "exp" / MODEL)
        profile = DepthProfile.load(path)
        profile.depths[(0,)].statistics = {}
        profile.save(path)
        encoder = calibrated([4, 2, 1]).asr_model.encoder
        assert not encoder.is_passed_by((0,), (0, 1, 2, 3))
        assert encoder.is_passed_by((0, 1), (0, 1, 2, 3))


class TestRefusals:
    def test_a_model_without_exits(self, recogniser, speech):
        with pytest.raises(UserError, match="exit_threshold needs a model with exits"):
            recogniser(encoder_conf=dict(exits=()), exit_threshold=0.1)
        with pytest.raises(UserError, match="exit_threshold needs a model with exits"):
            recogniser()(speech, exit_threshold=0.1)

    @pytest.mark.parametrize("threshold", [5.0, -1.0, math.nan, "x"])
    def test_what_no_entropy_can_be_below(self, recogniser, speech, threshold):
        with pytest.raises(UserError, match="write a number from 0 to 1"):
            recogniser(exit_threshold=threshold)
        with pytest.raises(UserError, match="write a number from 0 to 1"):
            recogniser(exit_threshold=0.5)(speech, exit_threshold=threshold)

    def test_a_beam_search(self, recogniser, speech):
        with pytest.raises(UserError, match="beam_size 1"):
            recogniser(beam_size=2, ctc_weight=1.0, exit_threshold=0.1)
        with pytest.raises(UserError, match="beam_size 1"):
            recogniser(beam_size=2, ctc_weight=1.0)(speech[0], exit_threshold=0.1)

    @pytest.mark.parametrize(
        "options", [dict(layers=[0, 3]), dict(depth=2, selector="even")]
    )
    def test_other_layers_than_the_first(self, recogniser, options):
        with pytest.raises(UserError, match=r"layers \[0, 3\]"):
            recogniser(**options, exit_threshold=0.1)

    def test_utterances_that_are_all_too_short(self, recogniser):
        with pytest.raises(TooShortUttError):
            recogniser(exit_threshold=0.5)(np.zeros(300, np.float32))


def test_entropy_is_of_valid_frames_and_from_0_to_1():
    log_probs = torch.zeros(3, 4, 8)
    log_probs[:2] = torch.full((8,), 1 / 8).log()
    log_probs[0, 2:] = torch.nn.functional.one_hot(torch.tensor(5), 8) * 100.0
    log_probs[2] = log_probs[0].roll(2, 0)
    found = entropy(log_probs.log_softmax(-1), torch.tensor([2, 4, 2]))
    assert found.tolist() == pytest.approx([1, 1, 0], abs=1e-6)


class TestThresholds:
    ENTROPIES = np.array([[0.5, 0.3, 0.1], [0.2, 0.1, 0.05], [0.9, 0.8, 0.4]])

    @pytest.mark.parametrize(
        "threshold, depth",
        [(0.0, 12), (0.06, (12 + 6 + 12) / 3), (0.35, 18 / 3), (1.0, 2)],
    )
    def test_mean_depth(self, threshold, depth):
        assert mean_depth(self.ENTROPIES, [2, 4, 6], 12, threshold) == depth

    def test_chosen_for_mean_depths(self):
        """As near as three utterances let them; what no threshold gives is left out."""
        chosen = choose_thresholds(self.ENTROPIES, [2, 4, 6], 12, [12, 10, 8, 4, 2, 1])
        for threshold, depth in chosen.items():
            assert mean_depth(self.ENTROPIES, [2, 4, 6], 12, threshold) == depth
        every = [
            mean_depth(self.ENTROPIES, [2, 4, 6], 12, t) for t in np.arange(0, 1, 0.01)
        ]
        for target, found in zip((10, 8, 4), chosen.values(), strict=True):
            assert abs(found - target) == min(abs(d - target) for d in every)
        assert choose_thresholds(self.ENTROPIES, [2, 4, 6], 12, [12]) == {}
        assert choose_thresholds(self.ENTROPIES, [], 12, [12, 2]) == {}
        middle = choose_thresholds(self.ENTROPIES, [2, 4, 6], 12, [7])
        assert len(middle) == 1
        assert choose_thresholds(self.ENTROPIES, [2, 4, 6], 12, [12, 2]) == middle

    def test_on_a_data_directory(self, recogniser, corpus):
        """In one pass, what decoding gives with them."""
        speech2text = recogniser()
        chosen = thresholds_on(speech2text, corpus.train, [4, 3, 2, 1])
        assert 1 <= len(chosen) <= 2
        speech = sorted(map(corpus.speech, "abcdefghi"), key=len)
        for threshold, depth in chosen.items():
            found = speech2text(speech, exit_threshold=threshold)
            assert np.mean([r[0][3].depth for r in found]) == depth

    def test_a_short_utterance_does_not_spoil_those_of_its_batch(
        self, recogniser, corpus, tmp_path, caplog
    ):
        (without,) = thresholds_on(recogniser(), corpus.train, [3])
        soundfile.write(tmp_path / "short.wav", np.zeros(300), 8000)
        wavs = (corpus.train / "wav.scp").read_text()
        (tmp_path / "wav.scp").write_text(f"{wavs}zz {tmp_path}/short.wav\n")
        (alone,) = thresholds_on(recogniser(), tmp_path, [3])
        # in a batch, padding enters convolutions
        assert alone == pytest.approx(without, abs=0.05)
        assert "chosen on 9 of 10 utterances" in caplog.text


def test_command_writes_the_depths(recogniser, corpus, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    speech = [corpus.speech(utt) for utt in "xyz"]
    expected, entropies = at_depths(recogniser(), speech)
    threshold = float(np.sort(entropies[:, 0])[:2].mean())  # not one of the three
    scp = tmp_path / "wav.scp"
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(300), 8000)
    scp.write_text((corpus.dev / "wav.scp").read_text() + f"zz {short}\n")
    main(
        ["--output_dir", f"{tmp_path}/out", "--num_workers", "0", "--batch_size", "3"]
        + ["--asr_train_config", f"{tmp_path}/exp/config.yaml"]
        + ["--asr_model_file", f"{tmp_path}/exp/{MODEL}"]
        + ["--data_path_and_name_and_type", f"{scp},speech,sound"]
        + ["--exit_threshold", repr(threshold)]
    )
    directory = tmp_path / "out/1best_recog"
    depths = dict(zip("xyz", map(str, first_below(entropies, threshold))))
    assert len(set(depths.values())) > 1

    def read(name):
        lines = (directory / name).read_text().splitlines()
        return dict(line.partition(" ")[::2] for line in lines)

    assert read("depth") == depths  # but for the one that is too short
    assert list(read("text")) == ["x", "y", "z", "zz"]
    for utt, (i, depth) in zip("xyz", enumerate(depths.values())):
        assert read("text")[utt].strip() == expected[int(depth)][i][0][0]
