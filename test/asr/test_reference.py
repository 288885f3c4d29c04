import kaldiio
import numpy as np
import pytest
import torch
from espnet2.bin import pack

from dldkit.asr.collection import collect_posteriors
from dldkit.asr.losses import CTCPosteriorKL
from dldkit.asr.reference import (
    CachedReference,
    LiveReference,
    open_reference,
)
from dldkit.errors import UserError

STILL = dict(specaug=None, encoder_conf=dict(dropout_rate=0.0, depth_sampler="full"))


@pytest.fixture
def student(build):
    """An untrained student; `DLDModel` opens its reference by `open_reference`."""
    return build(encoder="ld_conformer", model="dld", **STILL)


@pytest.fixture(scope="module")
def cached(static, corpus):
    """Return a function that gives the cached posteriors of `static`."""

    def directory(top_k=None):
        output = corpus.root / f"posteriors.{top_k}"
        collect_posteriors(static, [corpus.train, corpus.dev], output, top_k)
        return output

    return directory


def posteriors(reference, student, batch, *utts):
    """Ask a reference for a batch; with the student's log-posteriors."""
    cache = reference.path if isinstance(reference, CachedReference) else None
    utterances = batch(*utts, cache=cache)
    speech = utterances["speech"], utterances["speech_lengths"]
    stored = {k: v for k, v in utterances.items() if k.startswith("posteriors")}
    with torch.no_grad():
        encoded, _ = student.eval().encode(*speech)
    return reference(*speech, **stored), student.ctc.log_softmax(encoded)


class TestSources:
    def test_directory_checkpoint_and_zip_are_one(
        self, static, student, batch, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(static)
        options = ["--asr_train_config", "config.yaml"]
        options += ["--asr_model_file", "valid.loss_ctc.ave.pth"]
        pack.main(["asr", "--outpath", str(tmp_path / "static.zip"), *options])
        monkeypatch.chdir(tmp_path)
        model = torch.load(static / "valid.loss_ctc.ave.pth", weights_only=True)
        results = []
        for path in (static, static / "valid.loss_ctc.ave.pth", "static.zip"):
            reference = open_reference(path, student)
            assert isinstance(reference, LiveReference)
            weight = reference.model.ctc.ctc_lo.weight
            assert torch.equal(weight, model["ctc.ctc_lo.weight"])
            results.append(posteriors(reference, student, batch, "a", "c")[0])
        for result in results[1:]:
            assert torch.equal(result.log_probs, results[0].log_probs)

    def test_posteriors_are_log_probabilities(self, static, student, batch):
        result, log_probs = posteriors(
            open_reference(static, student), student, batch, "a", "c"
        )
        assert result.log_probs.shape == log_probs.shape
        total = result.log_probs.exp().sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)

    def test_a_dynamic_model_can_be_the_reference(self, build, tmp_path, batch):
        """Its own reference is not asked for."""
        conf = dict(reference=str(tmp_path / "gone"))
        build(1, tmp_path / "old", encoder="ld_conformer", model="dld", model_conf=conf)
        conf = dict(reference=str(tmp_path / "old"))
        student = build(encoder="ld_conformer", model="dld", model_conf=conf)
        assert student(**batch("a", "c"))[1]["loss_kd"] > 0
        assert student.open_reference().model.encoder.active_layers == (0, 1, 2, 3)

    def test_nothing_there(self, student, tmp_path):
        with pytest.raises(UserError, match=f"no {tmp_path}/nothing"):
            open_reference(tmp_path / "nothing", student)


class TestRefusals:
    """Each says which value differs."""

    def refusal(self, build, student, directory, **changes):
        build(directory=directory, **changes)
        with pytest.raises(UserError) as error:
            open_reference(directory, student)
        assert str(directory) in str(error.value)
        return str(error.value)

    def test_another_token_list(self, build, student, corpus, tmp_path):
        tokens = corpus.tokens.read_text().replace("three", "tree")
        (tmp_path / "tokens.txt").write_text(tokens)
        message = self.refusal(
            build, student, tmp_path / "ref", token_list=str(tmp_path / "tokens.txt")
        )
        assert "token list" in message and "token 5 is ['tree'] there" in message
        assert "['three'] here" in message

    def test_a_shorter_token_list(self, build, student, corpus, tmp_path):
        tokens = corpus.tokens.read_text().replace("nine\n", "")
        (tmp_path / "tokens.txt").write_text(tokens)
        message = self.refusal(
            build, student, tmp_path / "ref", token_list=str(tmp_path / "tokens.txt")
        )
        assert "12 tokens, the student 13" in message

    def test_another_sampling_rate(self, build, student, tmp_path):
        message = self.refusal(
            build, student, tmp_path / "ref", frontend_conf=dict(fs=16000)
        )
        assert "sampling rate: 16000 Hz, the student 8000 Hz" in message

    @pytest.mark.parametrize(
        "changes",
        [
            dict(frontend_conf=dict(hop_length=160)),
            dict(encoder_conf=dict(input_layer="conv2d6")),
        ],
    )
    def test_another_frame_rate(self, build, student, tmp_path, changes):
        message = self.refusal(build, student, tmp_path / "ref", **changes)
        assert "frame rate" in message and "encoder frames" in message

    def test_no_ctc(self, build, student, tmp_path):
        message = self.refusal(
            build,
            student,
            tmp_path / "ref",
            model_conf=dict(ctc_weight=0.0),
            decoder="transformer",
        )
        assert "no CTC posteriors" in message

    def test_cached_posteriors_of_another_model(self, build, student, corpus, tmp_path):
        build(directory=tmp_path / "ref", frontend_conf=dict(hop_length=160))
        collect_posteriors(tmp_path / "ref", [corpus.dev], tmp_path / "cache")
        with pytest.raises(UserError, match="frame rate"):
            open_reference(tmp_path / "cache", student)

    def test_features_of_another_frame_rate(self, build, tmp_path):
        """Models that take features show their frame rate only when they run."""
        features = dict(frontend=None, input_size=20, normalize=None)
        slow = dict(encoder_conf=dict(input_layer="conv2d6"))
        build(directory=tmp_path / "ref", **features, **slow)
        conf = dict(reference=str(tmp_path / "ref"))
        student = build(
            encoder="ld_conformer", model="dld", model_conf=conf, **features
        )
        batch = dict(
            speech=torch.randn(2, 90, 20),
            speech_lengths=torch.tensor([90, 70]),
            text=torch.tensor([[2, 3], [4, 5]]),
            text_lengths=torch.tensor([2, 2]),
            utt_id=["a", "b"],
        )
        message = r"\[14, 10\] frames where the student gives \[21, 16\].*'a', 'b'"
        with pytest.raises(UserError, match=message):
            student(**batch)


class TestCached:
    def test_gives_the_same_loss_as_the_live_reference(
        self, static, cached, student, batch
    ):
        """Alone, an utterance differs just by the cache's float16."""
        live = open_reference(static, student)
        cache = open_reference(cached(), student)
        assert isinstance(cache, CachedReference)
        for utts in (["a"], ["c"], ["x"]):
            a, log_probs = posteriors(live, student, batch, *utts)
            b, _ = posteriors(cache, student, batch, *utts)
            assert torch.allclose(a.log_probs, b.log_probs, atol=5e-3)
            for direction in ("forward", "reverse", "symmetric"):
                for temperature in (1.0, 2.0):
                    loss = CTCPosteriorKL(temperature, direction)
                    assert loss(log_probs, b).item() == pytest.approx(
                        loss(log_probs, a).item(), rel=1e-2
                    )

    def test_gives_the_same_loss_in_a_padded_batch(self, static, cached, build, batch):
        losses = []
        for reference, cache in ((static, None), (cached(), cached())):
            conf = dict(reference=str(reference))
            student = build(
                encoder="ld_conformer", model="dld", model_conf=conf, **STILL
            )
            utterances = batch("a", "c", "f", "x", cache=cache)
            assert len(set(utterances["speech_lengths"].tolist())) > 1
            losses.append(student(**utterances)[1]["loss_kd"].item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)

    @pytest.mark.parametrize("top_k", [3, 8, 12])
    def test_top_tokens_give_nearly_the_same_loss(
        self, static, cached, student, batch, top_k
    ):
        a, log_probs = posteriors(open_reference(static, student), student, batch, "c")
        b, _ = posteriors(open_reference(cached(top_k), student), student, batch, "c")
        assert b.log_probs.shape[-1] == top_k + 1
        assert torch.equal(b.tokens[0], a.log_probs[0].topk(top_k).indices)
        total = b.log_probs.exp().sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
        loss = CTCPosteriorKL()
        full, cut = (loss(log_probs, reference).item() for reference in (a, b))
        assert cut == pytest.approx(full, rel=0.01 if top_k == 12 else 0.3)
        assert cut <= full * 1.01

    def test_finds_utterances_by_name(self, cached, student, batch):
        cache = open_reference(cached(), student)
        (ac, _), (ca, _) = (
            posteriors(cache, student, batch, *utts) for utts in ("ac", "ca")
        )
        for row, utt in enumerate("ac"):
            frames = int(ac.lengths[row])
            assert torch.equal(
                ac.log_probs[row, :frames], ca.log_probs[1 - row, :frames]
            )
            stored = kaldiio.load_scp(str(cached() / "posteriors.scp"))[utt]
            assert np.array_equal(ac.log_probs[row, :frames].numpy(), stored)

    def test_refuses_posteriors_of_other_audio(self, cached, build, batch):
        conf = dict(reference=str(cached()))
        student = build(encoder="ld_conformer", model="dld", model_conf=conf)
        mixed = batch("a", "x", cache=cached()) | batch("a", "c")
        message = r"frames where the student gives .*'a', 'c'.* collected again"
        with pytest.raises(UserError, match=message):
            student(**mixed)

    def test_refuses_a_batch_without_posteriors(self, cached, build, batch):
        conf = dict(reference=str(cached()))
        student = build(encoder="ld_conformer", model="dld", model_conf=conf)
        message = "no posteriors of .*asr_train.*numpy_ark.*--allow_variable_data_keys"
        with pytest.raises(UserError, match=message):
            student(**batch("a", "c"))

    def test_refuses_a_temperature_with_top_tokens(self, cached, build, batch):
        conf = dict(reference=str(cached(3)), kd_temperature=2.0)
        student = build(encoder="ld_conformer", model="dld", model_conf=conf)
        with pytest.raises(UserError, match="kd_temperature .*--top_k"):
            student(**batch("a", cache=cached(3)))
