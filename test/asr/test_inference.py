import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from espnet2.bin import asr_inference as espnet_inference
from espnet2.bin import pack

from dldkit.asr.calibration import write_depth_profile
from dldkit.asr.inference import Speech2Text
from dldkit.asr.loading import load_asr_model
from dldkit.bin.asr_inference import get_parser, main
from dldkit.depth.profile import profile_path
from dldkit.errors import UserError

MODEL = "valid.loss_ctc.ave.pth"
BLANK, EOS = 0, 12


@pytest.fixture(scope="module")
def talkative(student, corpus, tmp_path_factory):
    """The student with a CTC head that finds all tokens in what it hears."""
    directory = tmp_path_factory.mktemp("exp") / "asr_talkative"
    directory.mkdir()
    shutil.copy(student / "config.yaml", directory)
    model, _ = load_asr_model(student / MODEL)
    frames = []
    with torch.no_grad():
        for speech in map(corpus.speech, "abcdefghi"):
            speech = torch.from_numpy(speech)[None]
            frames += model.encode(speech, torch.tensor([speech.size(1)]))[0]
    frames = torch.cat(frames)
    head = torch.randn(13, 8, generator=torch.Generator().manual_seed(0))
    states = model.state_dict()
    states["ctc.ctc_lo.weight"] = head / frames.std(0)
    states["ctc.ctc_lo.bias"] = -(head / frames.std(0)) @ frames.mean(0)
    states["ctc.ctc_lo.bias"][[BLANK, EOS]] += 1.5
    torch.save(states, directory / MODEL)
    return directory


@pytest.fixture(scope="module")
def load(talkative):
    """Return a function that builds our Speech2Text."""

    def speech2text(directory=talkative, **options):
        return Speech2Text(directory / "config.yaml", directory / MODEL, **options)

    return speech2text


@torch.no_grad()
def collapse(directory, *speech, depth=None):
    """Argmax, drop repeats, drop blanks: in numpy, with the model alone."""
    model, _ = load_asr_model(directory / MODEL)
    model.encoder.set_depth(depth)
    padded = np.zeros((len(speech), max(map(len, speech))), np.float32)
    for row, samples in zip(padded, speech):
        row[: len(samples)] = samples
    lengths = torch.tensor([len(samples) for samples in speech])
    encoded, lengths = model.encode(torch.from_numpy(padded), lengths)
    results = []
    for frames, length in zip(model.ctc.ctc_lo(encoded), lengths):
        log_probs = frames[:length].log_softmax(-1).numpy()
        path = log_probs.argmax(-1)
        tokens = []
        for t, token in enumerate(path):
            if (t == 0 or token != path[t - 1]) and token not in (BLANK, EOS):
                tokens.append(int(token))
        results.append((tokens, log_probs.max(-1).sum(), path))
    return results


class TestGreedy:
    @pytest.mark.parametrize("depth", [None, 1, 3])
    def test_against_a_plain_collapse(self, load, talkative, corpus, depth):
        speech2text = load(depth=depth)
        words = corpus.tokens.read_text().split()
        found = set()
        for utt in "abcdefghi":
            speech = corpus.speech(utt)
            ((expected, score, path),) = collapse(talkative, speech, depth=depth)
            ((text, token, token_int, hypothesis),) = speech2text(speech)
            assert token_int == expected
            assert token == [words[i] for i in expected]
            assert text == " ".join(token)
            assert hypothesis.score == pytest.approx(float(score), rel=1e-4)
            assert hypothesis.yseq.tolist() == [EOS, *expected, EOS]
            found |= set(path.tolist())
        if depth is None:
            assert {BLANK, EOS} < found  # or nothing was tested

    def test_repeats_blanks_and_end_of_sentence(self, load, monkeypatch):
        speech2text = load()
        path = [3, 3, 0, 3, 12, 5, 5, 0, 0, 5, 12, 4, 9, 9]

        def encode(speech, speech_lengths):
            frames = torch.nn.functional.one_hot(torch.tensor([path]), 13).float()
            return frames, torch.tensor([12])  # two frames are padding

        ctc = speech2text.asr_model.ctc
        monkeypatch.setattr(speech2text.asr_model, "encode", encode)
        monkeypatch.setattr(ctc, "log_softmax", lambda x: x.log_softmax(-1))
        result = speech2text(np.zeros(100, np.float32))
        assert result[0][2] == [3, 3, 5, 5, 4]

    def test_batches(self, load, talkative, corpus):
        """Of each utterance in the batch just its own frames are read."""
        speech = [corpus.speech(utt) for utt in "cafb"]
        assert len(set(map(len, speech))) == 4
        results = load()(speech)
        expected = collapse(talkative, *speech)
        for ((_, _, token_int, hypothesis),), (tokens, score, _) in zip(
            results, expected, strict=True
        ):
            assert token_int == tokens
            assert hypothesis.score == pytest.approx(float(score), rel=1e-4)

    def test_equal_lengths_in_a_batch_are_as_single_utterances(self, load, corpus):
        speech2text = load()
        speech = [corpus.speech(utt)[:4000] for utt in "abcd"]
        batch = [result[0][2] for result in speech2text(speech)]
        assert batch == [speech2text(samples)[0][2] for samples in speech]
        assert len(set(map(tuple, batch))) > 1

    def test_refused_without_ctc(self, build, tmp_path):
        build(
            directory=tmp_path / "exp",
            model_conf=dict(ctc_weight=0.0),
            decoder="transformer",
        )
        with pytest.raises(UserError, match="CTC.*--beam_size"):
            Speech2Text(
                tmp_path / "exp" / "config.yaml",
                tmp_path / "exp" / "valid.loss_ctc.best.pth",
            )


class TestDepth:
    def test_chosen_at_any_time(self, load, corpus):
        speech = corpus.speech("c")
        speech2text = load()
        scores = {}
        for depth in (None, 1, 2, 4, None):
            speech2text.set_depth(depth)
            score = speech2text(speech)[0][3].score
            assert scores.setdefault(depth or 4, score) == score
        assert len(set(scores.values())) == 3
        assert load(depth=2)(speech)[0][3].score == scores[2]

    def test_layers_and_selector(self, load):
        assert load(layers=[0, 3]).asr_model.encoder.active_layers == (0, 3)
        prefix = load(depth=2, selector="prefix")
        assert prefix.asr_model.encoder.active_layers == (0, 1)
        prefix.set_depth(3)
        assert prefix.asr_model.encoder.active_layers == (0, 1, 2)

    def test_refused_for_an_encoder_of_fixed_depth(self, static):
        fixed = static / "config.yaml", static / MODEL
        Speech2Text(*fixed)
        with pytest.raises(UserError, match="ConformerEncoder has no run-time depth"):
            Speech2Text(*fixed, depth=2)

    def test_refuses_an_impossible_depth(self, load):
        with pytest.raises(UserError, match="depth 5"):
            load(depth=5)


class TestDepthProfile:
    @pytest.fixture
    def profiled(self, talkative, corpus, tmp_path):
        directory = tmp_path / "exp"
        shutil.copytree(talkative, directory)
        write_depth_profile(directory / MODEL, corpus.train, [4, 2])
        return directory

    def score(self, speech2text, corpus):
        return speech2text(corpus.speech("c"))[0][3].score

    def test_beside_the_model_is_used_unless_told_not_to(self, load, profiled, corpus):
        plain, calibrated = (
            self.score(load(profiled, depth=2, depth_profile=profile), corpus)
            for profile in (None, "auto")
        )
        assert plain != calibrated
        assert plain == self.score(load(depth=2), corpus)
        elsewhere = profiled.parent / "elsewhere.pth"
        profile_path(profiled / MODEL).rename(elsewhere)
        assert self.score(load(profiled, depth=2), corpus) == plain
        named = load(profiled, depth=2, depth_profile=elsewhere)
        assert self.score(named, corpus) == calibrated

    def test_full_depth_has_one_meaning(self, load, profiled, corpus):
        """That of the profile, however it is reached, unless it is told not to."""
        checkpoint = self.score(load(), corpus)
        calibrated = self.score(load(profiled), corpus)
        assert calibrated != checkpoint
        assert self.score(load(profiled, depth=4), corpus) == calibrated
        speech2text = load(profiled, depth=2)
        for request in ((None,), (4,), (None, [3, 2, 1, 0])):
            speech2text.set_depth(2)
            speech2text.set_depth(*request)
            assert self.score(speech2text, corpus) == calibrated
            speech2text.set_depth(2)
            with speech2text.running(*request):
                assert self.score(speech2text, corpus) == calibrated
        assert self.score(load(profiled, depth_profile=None), corpus) == checkpoint

    def test_checkpoints_of_one_directory_do_not_meet(self, load, profiled, student):
        shutil.copy(student / "2epoch.pth", profiled)
        other = Speech2Text(profiled / "config.yaml", profiled / "2epoch.pth")
        assert other.asr_model.encoder.active_layers == (0, 1, 2, 3)
        load(profiled)

    def test_of_another_checkpoint_is_not_used(self, load, profiled, student, caplog):
        shutil.copy(student / "2epoch.pth", profiled / MODEL)
        load(profiled)
        assert "was calibrated for other weights" in caplog.text
        with pytest.raises(UserError, match="another checkpoint"):
            load(profiled, depth_profile=profile_path(profiled / MODEL))

    def test_missing_one_is_refused(self, load, tmp_path):
        with pytest.raises(UserError, match="no depth profile"):
            load(depth_profile=tmp_path / "none.pth")

    def test_works_in_half_precision(self, load, profiled):
        name = "encoders.3.conv_module.norm"
        rounded, exact = (
            load(profiled, depth=2, dtype=dtype).asr_model.encoder.get_submodule(name)
            for dtype in ("float16", "float32")
        )
        torch.testing.assert_close(rounded.means, exact.means.half())

    def test_requests_in_threads_have_their_own_depth(self, load, profiled, corpus):
        speech2text = load(profiled)

        def request(depth):
            with speech2text.running(depth):
                return [self.score(speech2text, corpus) for _ in range(5)]

        with ThreadPoolExecutor(2) as pool:
            found = dict(zip((2, 4), pool.map(request, (2, 4))))
        for depth, scores in found.items():
            speech2text.set_depth(depth)
            assert scores == [self.score(speech2text, corpus)] * 5


class TestESPnet:
    """Everything else is ESPnet's."""

    def test_beam_search(self, load, talkative, corpus, monkeypatch):
        files = talkative / "config.yaml", talkative / MODEL
        theirs = espnet_inference.Speech2Text(*files, beam_size=5, ctc_weight=1.0)
        ours = load(beam_size=5, ctc_weight=1.0)
        for utt in "ac":
            ((text, _, tokens, hypothesis),) = ours(corpus.speech(utt))
            expected = theirs(corpus.speech(utt))[0]
            assert (text, tokens) == (expected[0], expected[2])
            assert float(hypothesis.score) == float(expected[3].score)

    def test_beam_search_at_a_depth(self, load, corpus):
        scores = []
        for depth in (4, 1):
            ours = load(beam_size=3, ctc_weight=1.0, depth=depth)
            scores.append(float(ours(corpus.speech("c"))[0][3].score))
        assert scores[0] != scores[1]

    def test_quantised_models(self, load, corpus):
        speech2text = load(quantize_asr_model=True, depth=2)
        assert isinstance(speech2text(corpus.speech("a"))[0][2], list)

    def test_a_packed_zip_is_loaded_by_espnet(
        self, talkative, corpus, tmp_path, monkeypatch, load
    ):
        self.pack(talkative, tmp_path, monkeypatch)
        theirs = espnet_inference.Speech2Text.from_pretrained(
            str(tmp_path / "model.zip"), beam_size=2, ctc_weight=1.0
        )
        assert type(theirs) is espnet_inference.Speech2Text
        assert theirs.asr_model.encoder.active_layers == (0, 1, 2, 3)
        theirs.asr_model.encoder.set_depth(2)
        ours = load(beam_size=2, ctc_weight=1.0, depth=2)
        speech = corpus.speech("c")
        assert theirs(speech)[0][2] == ours(speech)[0][2]

    def test_a_packed_zip_is_loaded_at_a_depth(
        self, talkative, corpus, tmp_path, monkeypatch, load
    ):
        self.pack(talkative, tmp_path, monkeypatch)
        ours = Speech2Text.from_pretrained(str(tmp_path / "model.zip"), depth=2)
        speech = corpus.speech("c")
        assert ours(speech)[0][2] == load(depth=2)(speech)[0][2]

    def pack(self, directory, tmp_path, monkeypatch):
        """ESPnet's model zoo unpacks into the home directory."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(directory)
        options = ["--asr_train_config", "config.yaml", "--asr_model_file", MODEL]
        pack.main(["asr", "--outpath", str(tmp_path / "model.zip"), *options])
        monkeypatch.chdir(tmp_path)


class TestRefusals:
    def test_a_checkpoint_that_fits_nothing(self, talkative, tmp_path):
        torch.save({"other": torch.zeros(1)}, tmp_path / "model.pth")
        with pytest.raises(UserError, match="lacks .* weights"):
            Speech2Text(talkative / "config.yaml", tmp_path / "model.pth")

    @pytest.mark.parametrize("model", ["missing.pth", "small.pth", "text.pth"])
    def test_command_has_no_stack_trace(
        self, talkative, corpus, tmp_path, capsys, model
    ):
        states = torch.load(talkative / MODEL, weights_only=True)
        states["ctc.ctc_lo.weight"] = torch.zeros(3, 8)
        torch.save(states, tmp_path / "small.pth")
        (tmp_path / "text.pth").write_text("hello")
        with pytest.raises(SystemExit) as stop:
            main(command(talkative, corpus, tmp_path, model=tmp_path / model))
        assert stop.value.code == 1
        assert re.search(f"error: .*{model}", capsys.readouterr().err)


def command(directory, corpus, output, *options, model=None):
    """Return asr_inference's arguments for the validation data."""
    return [
        *("--output_dir", str(output / "decoded")),
        *("--asr_train_config", str(directory / "config.yaml")),
        *("--asr_model_file", str(model or directory / MODEL)),
        *("--data_path_and_name_and_type", f"{corpus.dev}/wav.scp,speech,sound"),
        *("--num_workers", "0"),
        *options,
    ]


class TestCommand:
    def results(self, output):
        directory = output / "decoded" / "1best_recog"
        return {
            file.name: dict(
                line.partition(" ")[::2] for line in file.read_text().splitlines()
            )
            for file in directory.iterdir()
        }

    @pytest.mark.parametrize(
        "options, depth, batches",
        [
            ([], None, ["xyz"]),
            (["--depth", "2"], 2, ["xyz"]),
            (["--batch_size", "1"], None, ["x", "y", "z"]),
            (["--batch_size", "2", "--depth", "1"], 1, ["xy", "z"]),
        ],
    )
    def test_writes_what_espnet_writes(
        self, talkative, corpus, tmp_path, load, caplog, options, depth, batches
    ):
        caplog.set_level(logging.INFO)
        main(command(talkative, corpus, tmp_path, *options))
        results = self.results(tmp_path)
        assert sorted(results) == ["score", "text", "token", "token_int"]
        speech2text = load(depth=depth)
        for utts in batches:
            decoded = speech2text([corpus.speech(utt) for utt in utts])
            for utt, ((text, token, token_int, hypothesis),) in zip(utts, decoded):
                assert results["text"][utt].strip() == text
                assert results["token"][utt].split() == token
                assert results["token_int"][utt].split() == list(map(str, token_int))
                score = float(results["score"][utt])
                assert score == pytest.approx(hypothesis.score, rel=1e-4)
        assert any(results["text"].values())

    def test_logs_what_gives_the_real_time_factor(
        self, talkative, corpus, tmp_path, caplog
    ):
        """ESPnet's calculate_rtf.py pairs these lines."""
        caplog.set_level(logging.INFO)
        main(command(talkative, corpus, tmp_path))
        lengths = [
            int(m[1])
            for message in caplog.messages
            if (m := re.fullmatch(r"speech length: (\d+)", message))
        ]
        assert sorted(lengths) == sorted(len(corpus.speech(utt)) for utt in "xyz")
        ends = [m for m in caplog.messages if m.startswith("best hypo: ")]
        assert len(ends) == 3

    @pytest.mark.parametrize(
        "options, layers",
        [
            (["--depth", "3"], (0, 2, 3)),
            (["--depth", "3", "--selector", "prefix"], (0, 1, 2)),
            (["--layers", "3,1"], (1, 3)),
        ],
    )
    def test_runs_the_layers_that_it_is_told(
        self, talkative, corpus, tmp_path, caplog, options, layers
    ):
        caplog.set_level(logging.INFO)
        main(command(talkative, corpus, tmp_path, *options))
        assert f"Encoder layers: {layers}" in caplog.messages

    def test_beam_search(self, talkative, corpus, tmp_path, load):
        options = ["--beam_size", "5", "--ctc_weight", "1.0", "--batch_size", "1"]
        main(command(talkative, corpus, tmp_path, *options, "--depth", "2"))
        results = self.results(tmp_path)
        speech2text = load(beam_size=5, ctc_weight=1.0, depth=2)
        for utt in "xyz":
            text = speech2text(corpus.speech(utt))[0][0]
            assert results["text"][utt].strip() == text

    def test_impossible_depth(self, talkative, corpus, tmp_path, capsys):
        with pytest.raises(SystemExit) as stop:
            main(command(talkative, corpus, tmp_path, "--depth", "9"))
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert "error: depth 9 is impossible: the encoder has 4 layers" in error

    @pytest.mark.parametrize(
        "options", [["--depth", "1", "--layers", "0"], ["--layers", "one"]]
    )
    def test_nonsense(self, options, capsys):
        with pytest.raises(SystemExit) as stop:
            main(options)
        assert stop.value.code == 2
        assert "--layers" in capsys.readouterr().err

    def test_leaves_espnets_class_as_it_was(self, talkative, corpus, tmp_path):
        theirs = espnet_inference.Speech2Text
        main(command(talkative, corpus, tmp_path))
        assert espnet_inference.Speech2Text is theirs

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for option in ("--depth", "--layers", "--selector", "--beam_size", "--lm_file"):
            assert option in text

    def test_greedy_batches_are_the_default(self):
        options = get_parser().parse_args(["--output_dir", "x"] + NEEDED)
        assert options.beam_size == 1 and options.batch_size > 1
        assert options.depth is None and options.layers is None


NEEDED = ["--data_path_and_name_and_type", "a,speech,sound"]
