import argparse
import signal

import kaldiio
import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.asr.espnet_model import ESPnetASRModel

from dldkit.asr import collection
from dldkit.asr.collection import collect_posteriors
from dldkit.asr.loading import load_asr_model
from dldkit.bin.collect_posteriors import main
from dldkit.data import frames
from dldkit.errors import UserError
from dldkit.tasks.asr import DLDASRTask


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the parts one after the other, and remember how many there were."""
    parts = []

    def parallel_map(fn, items, *_):
        parts.append(len(items))
        return [fn(item) for item in items]

    monkeypatch.setattr(frames, "parallel_map", parallel_map)
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


def test_touched_files_and_other_jobs_keep_it(static, corpus, tmp_path):
    collect_posteriors(static, [corpus.dev], tmp_path)
    before = stamps(tmp_path)
    (corpus.dev / "wav.scp").touch()
    collect_posteriors(static, [corpus.dev], tmp_path, nj=2)
    assert stamps(tmp_path) == before


def test_parts_make_the_same_whole(
    static, corpus, tmp_path, in_this_process, monkeypatch
):
    collect_posteriors(static, [corpus.train, corpus.dev], tmp_path / "one")
    monkeypatch.setattr(frames, "PART", 2)
    collect_posteriors(static, [corpus.train, corpus.dev], tmp_path / "parts", nj=2)
    one, parts = read(tmp_path / "one"), read(tmp_path / "parts")
    assert in_this_process == [2, 5 + 2]
    assert sorted(one) == sorted(parts) == list("abcdefghixyz")
    assert all(np.array_equal(one[utt], parts[utt]) for utt in one)


def test_an_interrupted_collection_continues(
    static, corpus, tmp_path, in_this_process, monkeypatch
):
    monkeypatch.setattr(frames, "PART", 3)
    data = [corpus.train, corpus.dev]
    collect_posteriors(static, data, tmp_path / "unbroken", nj=2)
    pack, written = collection.pack, []

    def killed(*args):  # in the middle of the third part
        written.append(args)
        if len(written) == 8:
            raise KeyboardInterrupt
        return pack(*args)

    monkeypatch.setattr(collection, "pack", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_posteriors(static, data, tmp_path / "broken", nj=2)
    assert not (tmp_path / "broken" / "posteriors.scp").exists()
    kept = {f: stamps(tmp_path / "broken")[f] for f in ("0-0.ark", "0-3.ark")}
    monkeypatch.setattr(collection, "pack", pack)
    collect_posteriors(static, data, tmp_path / "broken", nj=1)  # other jobs
    assert in_this_process == [4, 4, 2]
    assert kept.items() <= stamps(tmp_path / "broken").items()
    broken, unbroken = read(tmp_path / "broken"), read(tmp_path / "unbroken")
    assert sorted(broken) == list("abcdefghixyz")
    assert all(np.array_equal(broken[utt], unbroken[utt]) for utt in unbroken)


# Runs the command, and dies in the middle of the second of its parts.
KILLED = """
import os, signal, sys
from dldkit.asr import collection
from dldkit.bin.collect_posteriors import main
pack, packed = collection.pack, []
def killing(*args):
    packed.append(args)
    if len(packed) == 250:
        os.kill(os.getpid(), signal.SIGKILL)
    return pack(*args)
collection.pack = killing
main(sys.argv[1:])
"""


@pytest.mark.integration
def test_a_killed_collection_continues(static, corpus, tmp_path, python):
    """A real process, killed after the first of three parts."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    lines = [f"{i:03} {corpus.train}/{'abc'[i % 3]}.wav\n" for i in range(500)]
    (data / "wav.scp").write_text("".join(lines))
    command = ["--reference", static, "--data_dirs", data, "--output_dir", cache]
    python("-c", KILLED, *command, status=-signal.SIGKILL)
    assert not (cache / "posteriors.scp").exists()
    assert not (cache / "0-200.scp").exists()
    first = (cache / "0-0.ark").stat().st_mtime_ns
    python("-m", "dldkit.bin.collect_posteriors", *command)
    assert (cache / "0-0.ark").stat().st_mtime_ns == first
    stored = read(cache)
    assert len(stored) == 500
    for i in range(3, 500):  # another size of batch rounds differently
        same = stored[f"{i % 3:03}"]
        assert np.allclose(stored[f"{i:03}"], same, rtol=2e-3, atol=1e-3)


@pytest.fixture
def own_data(corpus, tmp_path):
    """Two utterances of one length, one of another, and one that is too short."""
    directory = tmp_path / "data"
    directory.mkdir()
    a, b = corpus.speech("a"), corpus.speech("b")
    size = min(len(a), len(b))
    sounds = dict(a=a[:size], b=b[:size], c=corpus.speech("c"), s=a[:600])
    for utt, samples in sounds.items():
        soundfile.write(directory / f"{utt}.wav", samples, 8000)
    lines = [f"{utt} {directory / utt}.wav\n" for utt in sounds]
    (directory / "wav.scp").write_text("".join(lines))
    (directory / "text").write_text("".join(f"{utt} one\n" for utt in sounds))
    return directory


def test_batches_equal_one_utterance_at_a_time(static, own_data, tmp_path, monkeypatch):
    encode, sizes = ESPnetASRModel.encode, []

    def counted(self, speech, lengths):
        sizes.append(len(speech))
        return encode(self, speech, lengths)

    monkeypatch.setattr(ESPnetASRModel, "encode", counted)
    collect_posteriors(static, [own_data], tmp_path / "batches")
    assert 2 in sizes
    monkeypatch.setattr(frames, "BATCH", 1)
    collect_posteriors(static, [own_data], tmp_path / "single")
    batches, single = read(tmp_path / "batches"), read(tmp_path / "single")
    for utt in "abc":
        assert np.allclose(batches[utt], single[utt], rtol=1e-3, atol=1e-3)


def test_too_short_utterances_are_left_out(
    static, corpus, own_data, tmp_path, caplog, capsys
):
    cache = tmp_path / "cache"
    collect_posteriors(static, [own_data], cache)
    assert sorted(read(cache)) == list("abc")
    assert (cache / "too_short").read_text() == "s\n"
    assert "s is too short: nothing is stored" in caplog.text
    paths = [[str(own_data / "wav.scp"), "speech", "sound"]]
    args = argparse.Namespace(
        model_conf=dict(reference=str(cache)),
        collect_stats=False,
        multiple_iterator=False,
        train_data_path_and_name_and_type=paths,
        valid_data_path_and_name_and_type=[],
    )
    with pytest.raises(UserError, match="1 of 4 utterances are too short .* is s: "):
        DLDASRTask.check_data(args)
    paths[0][0] = str(corpus.train / "wav.scp")
    with pytest.raises(UserError, match="6 of 9 .* no posteriors .* is d: collect"):
        DLDASRTask.check_data(args)


def test_a_gpu_is_looked_for_where_the_work_is_done(
    static, corpus, tmp_path, in_this_process, monkeypatch
):
    """A login node has none: the jobs that it submits find out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for where, jobs in (({}, []), ({"parallel_config": "slurm.yaml"}, [1])):
        with pytest.raises(UserError, match="ngpu 1: no GPU"):
            collect_posteriors(static, [corpus.dev], tmp_path, ngpu=1, **where)
        assert in_this_process == jobs


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
    collection._load.cache_clear()  # a new command knows nothing
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
