"""All commands in a row: on audio, audio in arks, log mel energies, own features."""

import shutil

import kaldiio
import pytest
import yaml

from dldkit.bin import (
    asr_train,
    calibrate,
    collect_posteriors,
    decode,
    depth_report,
    format_data,
    pack,
)
from dldkit.report.scoring import read_text

MODEL = "valid.loss_ctc.ave.pth"

pytestmark = pytest.mark.integration


@pytest.fixture(params=["raw", "flac.ark", "fbank", "extracted"])
def dump(request, corpus, tmp_path):
    """The corpus in one format, as stage 3 writes it; with options for training."""
    kind = request.param
    for part, src in (("train", corpus.train), ("dev", corpus.dev)):
        data = tmp_path / "data" / part
        shutil.copytree(src, data)
        (data / "utt2num_samples").unlink()
        utts = read_text(data / "text")
        (data / "utt2spk").write_text("".join(f"{u} {u}\n" for u in sorted(utts)))
        options = "--fs 8k --n_mels 20 --feats_type".split()
        if kind == "extracted":
            fbank = tmp_path / "fbank" / part
            format_data.main([str(data), str(fbank), *options, "fbank"])
            shutil.copy(fbank / "feats.scp", data)
            (data / "wav.scp").unlink()
        if kind == "flac.ark":
            options += ["raw", "--audio_format", kind]
        else:
            options += [kind]
        format_data.main([str(data), str(tmp_path / "dump" / part), *options])
    return tmp_path / "dump", kind


def scores(directory):
    lines = (directory / "score").read_text().splitlines()
    return {utt: float(score) for utt, score in map(str.split, lines)}


def test_every_command(dump, corpus, tmp_path):
    dump, kind = dump
    is_audio = kind in ("raw", "flac.ark")
    scp = "wav.scp" if is_audio else "feats.scp"
    data_type = "sound" if kind == "raw" else "kaldi_ark"
    shape = "utt2num_samples" if is_audio else "feats_shape"

    def train(directory, *words, **changes):
        argv = corpus.training(directory, max_epoch=1, **changes)
        config = yaml.safe_load(open(argv[1]))
        if not is_audio:
            config.update(frontend=None, frontend_conf={}, input_size=20)
        for part, name in (("train", "train"), ("valid", "dev")):
            config[f"{part}_data_path_and_name_and_type"] = [
                [f"{dump}/{name}/{scp}", "speech", data_type],
                [f"{dump}/{name}/text", "text", "text"],
            ]
            config[f"{part}_shape_file"] = [f"{dump}/{name}/{shape}"]
        with open(argv[1], "w") as file:
            yaml.safe_dump(config, file)
        asr_train.main([*argv, *words])

    train(tmp_path / "stats", "--collect_stats", "true")
    normal = dict(
        normalize="global_mvn",
        normalize_conf=dict(stats_file=f"{tmp_path}/stats/train/feats_stats.npz"),
    )
    train(tmp_path / "static", **normal)
    sets = [str(dump / "train"), str(dump / "dev")]
    cache = ["--output_dir", str(tmp_path / "cache"), "--top_k", "4", "--data_dirs"]
    collect_posteriors.main(["--reference", str(tmp_path / "static"), *cache, *sets])
    exp = tmp_path / "dld"
    student = dict(encoder="ld_conformer", model="dld")
    conf = dict(reference=str(tmp_path / "cache"), valid_depths=[4, 2])
    train(exp, **normal, **student, model_conf=conf)

    model = ["--asr_model_file", str(exp / MODEL)]
    calibrate.main([*model, "--data_dir", sets[0], "--depths", "4,2,1"])
    options = ["--asr_exp", str(exp), "--inference_asr_model", MODEL]
    options += ["--data_dirs", str(dump / "dev")]
    decode.main([*options, "--inference_tag", "all", "--depths", "4 2 1"])
    for depth in "124":  # each as if it were the first
        decode.main([*options, "--inference_tag", depth, "--depths", depth])
        places = [exp / tag / f"depth{depth}" / "dev" for tag in ("all", depth)]
        assert scores(places[0]) == pytest.approx(scores(places[1]), rel=1e-5)

    report = ["--system", f"dld={exp}", "--data_root", str(dump), "--test_sets", "dev"]
    report += ["--depths", "4 2 1", "--inference_tag", "all", "--rtf_utts", "1"]
    report += ["--inference_asr_model", MODEL, "--output_dir", str(tmp_path / "report")]
    depth_report.main(report)
    assert "| dld" in (tmp_path / "report" / "RESULTS.md").read_text()
    archive = tmp_path / "pack" / "model.zip"
    options = ["--model_file", str(exp / MODEL), "--outpath", str(archive)]
    pack.main(["asr", *options, "--data_dir", str(dump / "dev")])
    assert archive.is_file()
    stored = kaldiio.load_scp(str(tmp_path / "cache" / "posteriors.scp"))
    assert len(stored) == 12
