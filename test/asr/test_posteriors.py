import kaldiio
import numpy as np
import pytest
import torch
import yaml

from dldkit.asr import posteriors
from dldkit.asr.loading import load_asr_model
from dldkit.asr.posteriors import collect_posteriors
from dldkit.bin.collect_posteriors import main
from dldkit.errors import UserError


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the parts one after the other, and remember how many there were."""
    parts = []

    def parallel_map(fn, items, *_):
        parts.append(len(items))
        return [fn(item) for item in items]

    monkeypatch.setattr(posteriors, "parallel_map", parallel_map)
    return parts


def read(directory):
    return dict(kaldiio.load_scp(str(directory / "posteriors.scp")).items())


def stamps(directory):
    return {f.name: f.stat().st_mtime_ns for f in directory.iterdir()}


def test_stores_the_models_posteriors_utterance_by_utterance(static, corpus, tmp_path):
    collect_posteriors(static, [corpus.train, corpus.dev], tmp_path)
    stored = read(tmp_path)
    assert sorted(stored) == list("abcdefghixyz")
    model, _ = load_asr_model(static)
    for utt in "acxz":
        speech = torch.from_numpy(corpus.speech(utt))[None]
        with torch.no_grad():
            encoded, _ = model.encode(speech, torch.tensor([speech.size(1)]))
            expected = model.ctc.ctc_lo(encoded).log_softmax(-1)[0].numpy()
        assert stored[utt].dtype == np.float16
        assert np.allclose(stored[utt], expected, rtol=1e-3, atol=1e-3)


def test_describes_the_reference(static, corpus, tmp_path):
    collect_posteriors(static, [corpus.dev], tmp_path, top_k=4)
    description = yaml.safe_load((tmp_path / "reference.yaml").read_text())
    assert description["token_list"] == corpus.tokens.read_text().split()
    assert description["sampling_rate"] == 8000
    assert description["frames"] == ((16000 // 128 + 1 - 1) // 2 - 1) // 2
    assert description["top_k"] == 4


def test_a_finished_collection_is_kept(static, corpus, tmp_path):
    collect_posteriors(static, [corpus.dev], tmp_path)
    before = stamps(tmp_path)
    collect_posteriors(static, [corpus.dev], tmp_path)
    assert stamps(tmp_path) == before


@pytest.mark.parametrize("nj", [2, 5])
def test_parts_make_the_same_whole(static, corpus, tmp_path, in_this_process, nj):
    collect_posteriors(static, [corpus.train, corpus.dev], tmp_path / "one")
    collect_posteriors(static, [corpus.train, corpus.dev], tmp_path / "parts", nj=nj)
    one, parts = read(tmp_path / "one"), read(tmp_path / "parts")
    assert in_this_process == [2, 2 * nj]
    assert sorted(one) == sorted(parts) == list("abcdefghixyz")
    assert all(np.array_equal(one[utt], parts[utt]) for utt in one)


def test_an_interrupted_collection_continues(
    static, corpus, tmp_path, in_this_process, monkeypatch
):
    data = [corpus.train, corpus.dev]
    collect_posteriors(static, data, tmp_path / "unbroken", nj=2)
    write, done = posteriors._write_part, []

    def killed(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args)
        write(*args)

    monkeypatch.setattr(posteriors, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_posteriors(static, data, tmp_path / "broken", nj=2)
    assert not (tmp_path / "broken" / "posteriors.scp").exists()
    kept = {k: v for k, v in stamps(tmp_path / "broken").items() if "ark" in k}
    monkeypatch.setattr(posteriors, "_write_part", write)
    collect_posteriors(static, data, tmp_path / "broken", nj=2)
    assert in_this_process == [4, 4, 2]
    assert kept.items() <= stamps(tmp_path / "broken").items()
    broken, unbroken = read(tmp_path / "broken"), read(tmp_path / "unbroken")
    assert sorted(broken) == list("abcdefghixyz")
    assert all(np.array_equal(broken[utt], unbroken[utt]) for utt in unbroken)


def test_another_request_starts_anew(static, corpus, tmp_path):
    collect_posteriors(static, [corpus.dev], tmp_path)
    collect_posteriors(static, [corpus.dev], tmp_path, top_k=2)
    assert read(tmp_path)["x"].shape[1] == 4
    collect_posteriors(static, [corpus.dev, corpus.train], tmp_path, top_k=2)
    assert len(read(tmp_path)) == 12


def test_a_retrained_reference_is_asked_again(build, corpus, tmp_path):
    model = build(directory=tmp_path / "ref")
    collect_posteriors(tmp_path / "ref", [corpus.dev], tmp_path / "cache")
    before = read(tmp_path / "cache")["x"]
    torch.nn.init.normal_(model.ctc.ctc_lo.weight)
    torch.save(model.state_dict(), tmp_path / "ref" / "valid.loss_ctc.best.pth")
    posteriors._load.cache_clear()  # a new command knows nothing
    collect_posteriors(tmp_path / "ref", [corpus.dev], tmp_path / "cache")
    assert not np.array_equal(read(tmp_path / "cache")["x"], before)


def test_other_peoples_files_are_not_deleted(static, corpus, tmp_path):
    treasure = tmp_path / "exp" / "treasure.pth"
    treasure.parent.mkdir()
    treasure.write_text("weeks of training")
    try:
        collect_posteriors(static, [corpus.dev], treasure.parent)
    except UserError:
        pass
    assert treasure.is_file()


@pytest.mark.parametrize("top_k", [0, 13, -1])
def test_refuses_an_impossible_top_k(static, corpus, tmp_path, top_k):
    with pytest.raises(UserError, match=f"top_k {top_k} .* 13 tokens"):
        collect_posteriors(static, [corpus.dev], tmp_path, top_k=top_k)


def test_command(static, corpus, tmp_path, capsys):
    output = tmp_path / "cache"
    command = ["--reference", str(static), "--output_dir", str(output)]
    data = [str(corpus.train), str(corpus.dev)]
    main([*command, "--top_k", "3", "--data_dirs", *data])
    assert len(read(output)) == 12
    with pytest.raises(SystemExit) as stop:
        main([*command, "--data_dirs", str(tmp_path)])
    assert stop.value.code == 1
    assert f"error: {tmp_path} has neither wav.scp" in capsys.readouterr().err
