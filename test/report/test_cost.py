import numpy as np
import pytest
import soundfile
import torch
from espnet2.asr.ctc import CTC
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder

from dldkit.asr.encoder import LDConformerEncoder, LDTransformerEncoder
from dldkit.asr.exits import ExitHeads
from dldkit.errors import UserError
from dldkit.report.cost import (
    TimedDecoder,
    Utterance,
    evenly_spaced,
    macs,
    parameters_in_use,
    real_time_factors,
    speech_seconds,
)

D, FF, KERNEL, VOCAB, MELS = 8, 16, 3, 5, 20
SIZES = dict(input_size=MELS, output_size=D, attention_heads=2, linear_units=FF)
CONFORMER = dict(**SIZES, macaron_style=True, cnn_module_kernel=KERNEL)


class Recogniser(torch.nn.Module):
    """The parts of an ESPnet model that recognition uses, and a decoder."""

    def __init__(self, encoder):
        super().__init__()
        self.frontend = self.normalize = self.preencoder = self.postencoder = None
        self.encoder = encoder
        self.ctc = CTC(VOCAB, D)
        self.decoder = torch.nn.Linear(D, 1000)
        self.eval()

    def encode(self, speech, lengths):
        return self.encoder(speech, lengths)[:2]


def layer_parameters():
    linear = D * FF + FF + FF * D + D
    attention = 4 * (D * D + D) + D * D + 2 * D  # q k v out, position, u and v
    pointwise = D * 2 * D + 2 * D + D * D + D
    convolution = pointwise + D * KERNEL + D + 2 * D  # depthwise, BatchNorm
    return 2 * linear + attention + convolution + 5 * 2 * D  # five LayerNorms


def other_parameters():
    mels = ((MELS - 1) // 2 - 1) // 2
    subsampling = (9 * D + D) + (9 * D * D + D) + (D * mels * D + D)
    return subsampling + 2 * D + D * VOCAB + VOCAB  # after_norm, CTC


def layer_macs(frames):
    """One Conformer layer with ESPnet's legacy relative positions."""
    linear = 2 * 2 * D * FF * frames
    attention = 4 * D * D * frames + D * D * frames + 3 * D * frames**2
    convolution = 2 * D * D * frames + KERNEL * D * frames + D * D * frames
    return linear + attention + convolution


def other_macs(length):
    time1, mels1 = (length - 1) // 2, (MELS - 1) // 2
    time2, mels2 = (time1 - 1) // 2, (mels1 - 1) // 2
    subsampling = 9 * D * time1 * mels1 + 9 * D * D * time2 * mels2
    return subsampling + time2 * D * mels2 * D + time2 * D * VOCAB


def test_parameters_are_those_counted_by_hand():
    model = Recogniser(LDConformerEncoder(**CONFORMER, num_blocks=4))
    for depth in (4, 3, 1):
        model.encoder.set_depth(depth)
        expected = other_parameters() + depth * layer_parameters()
        assert parameters_in_use(model) == expected


def test_final_norm_of_a_skipped_layer_is_in_use():
    model = Recogniser(
        LDConformerEncoder(**CONFORMER, num_blocks=4, keep_final_norm=True)
    )
    model.encoder.set_depth(layers=[0, 3])
    expected = other_parameters() + 2 * layer_parameters() + 2 * 2 * D
    assert parameters_in_use(model) == expected


def test_one_output_layer_at_a_time_is_in_use():
    encoder = LDConformerEncoder(**CONFORMER, num_blocks=4)
    model = Recogniser(encoder)
    model.ctc.ctc_lo = ExitHeads(model.ctc.ctc_lo, [1, 2], encoder.gates)
    for depth in (4, 2, 1):
        encoder.set_depth(depth)
        expected = other_parameters() + depth * layer_parameters()
        assert parameters_in_use(model) == expected


def test_static_encoder_uses_everything():
    model = Recogniser(ConformerEncoder(**CONFORMER, num_blocks=3))
    assert parameters_in_use(model) == other_parameters() + 3 * layer_parameters()


def test_macs_of_a_conformer_are_those_counted_by_hand():
    model = Recogniser(LDConformerEncoder(**CONFORMER, num_blocks=4))
    length = 83
    frames = ((length - 1) // 2 - 1) // 2
    feats = np.random.default_rng(0).normal(size=(length, MELS)).astype("float32")
    counts = []
    for depth in (1, 2, 4):
        model.encoder.set_depth(depth)
        counts.append(macs(model, feats))
        assert counts[-1] == other_macs(length) + depth * layer_macs(frames)
    assert counts == sorted(set(counts))


def test_macs_of_a_stack_of_known_layers():
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = torch.nn.Conv1d(6, 12, 5, groups=3)
            self.linear = torch.nn.Linear(12, D)

        def forward(self, feats, lengths):
            hidden = self.grouped(feats.transpose(1, 2)).transpose(1, 2)
            return self.linear(hidden), lengths - 4, None

    time_out = 50 - 4
    grouped, linear, head = time_out * 12 * 2 * 5, time_out * 12 * D, time_out * D * 5
    feats = np.ones((50, 6), dtype="float32")
    assert macs(Recogniser(Stack()), feats) == grouped + linear + head


def test_macs_with_intermediate_ctc():
    encoder = LDTransformerEncoder(**SIZES, num_blocks=3, interctc_layer_idx=[1])
    plain = LDTransformerEncoder(**SIZES, num_blocks=3)
    feats = np.ones((40, MELS), dtype="float32")
    # the exits are norms without matrix products, the head runs once
    assert macs(Recogniser(encoder), feats) == macs(Recogniser(plain), feats)


def test_too_short_an_utterance_is_named():
    model = Recogniser(LDConformerEncoder(**CONFORMER, num_blocks=1))
    with pytest.raises(UserError, match="median length.*3 frames"):
        macs(model, np.ones((3, MELS), dtype="float32"))


def test_seconds_of_audio(tmp_path):
    samples = {"a": 16000, "b": 4000, "c": 8000, "d": 24000}
    with (tmp_path / "wav.scp").open("w") as scp:
        for utt_id, number in samples.items():
            path = tmp_path / f"{utt_id}.flac"
            soundfile.write(path, np.zeros(number), 8000)
            scp.write(f"{utt_id} {path}\n")
    seconds = speech_seconds(tmp_path, 0.01)
    assert list(seconds.items()) == [("b", 0.5), ("c", 1.0), ("a", 2.0), ("d", 3.0)]


def test_seconds_of_features(tmp_path):
    (tmp_path / "feats.scp").write_text("a f.ark:0\nb f.ark:9\n")
    (tmp_path / "feats_shape").write_text("a 300,80\nb 100,80\n")
    seconds = speech_seconds(tmp_path, frame_shift=0.02)
    assert list(seconds.items()) == [("b", 2.0), ("a", 6.0)]


def test_speech_that_can_not_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="neither wav.scp nor feats.scp"):
        speech_seconds(tmp_path, 0.01)
    (tmp_path / "wav.scp").write_text("a nowhere.flac\n")
    with pytest.raises(UserError, match="wav.scp: can not read a: .*nowhere.flac"):
        speech_seconds(tmp_path, 0.01)
    (tmp_path / "wav.scp").write_text("")
    with pytest.raises(UserError, match="has no utterance"):
        speech_seconds(tmp_path, 0.01)


def test_utterances_are_spread_over_the_lengths():
    assert evenly_spaced("abcde", 1) == ["c"]
    assert evenly_spaced("abcdef", 1) == ["d"]
    assert evenly_spaced("abcdef", 2) == ["b", "e"]
    assert evenly_spaced("abc", 20) == ["a", "b", "c"]
    assert evenly_spaced("abc", 0) == []


def test_decoders_take_turns_on_one_thread(monkeypatch):
    calls = []
    depth, clock = None, 0.0
    monkeypatch.setattr("dldkit.report.cost.time.perf_counter", lambda: clock)

    def timed(name, utterances):
        def prepare():
            nonlocal depth, clock
            depth = name
            clock += 100.0  # is not part of decoding

        def decode(speech):
            nonlocal clock
            calls.append((depth, name, len(speech), torch.get_num_threads()))
            clock += 0.01 * len(calls)  # a machine that slows down

        return TimedDecoder(prepare, decode, utterances)

    short, long = (Utterance(np.zeros(n), n / 100) for n in (10, 30))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, two = real_time_factors(
            [timed("one", [short, long]), timed("two", [long])], repeats=2
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    warm_up = [("one", 30), ("two", 30)]
    one_repeat = [("one", 10), ("one", 30), ("two", 30)]
    assert [(name, n) for _, name, n, _ in calls] == warm_up + 2 * one_repeat
    assert all(depth == name for depth, name, _, _ in calls)
    assert {threads for *_, threads in calls} == {1}
    # calls 3 and 4, then 6 and 7, over 0.4 s of audio; 5, then 8, over 0.3 s
    assert one == pytest.approx([0.07 / 0.4, 0.13 / 0.4])
    assert two == pytest.approx([0.05 / 0.3, 0.08 / 0.3])


def test_an_utterance_too_short_to_decode_does_not_stop_the_clock():
    encoder = LDConformerEncoder(**CONFORMER, num_blocks=1)

    def decode(speech):
        encoder(torch.as_tensor(speech)[None], torch.tensor([len(speech)]))

    feats = [np.ones((n, MELS), dtype="float32") for n in (3, 60)]
    utterances = [Utterance(f, len(f) / 100) for f in feats]
    (factors,) = real_time_factors([TimedDecoder(lambda: None, decode, utterances)], 2)
    assert len(factors) == 2 and min(factors) > 0
