"""Bad input to the commands: each ends in one line that says what, where, what to do.

The recipes' options have a table of their own, in recipe/test_recipe.py.
"""

import importlib
import re
import shutil

import pytest
import soundfile
import torch
import yaml

MODEL = "valid.loss_ctc.ave.pth"

# {tmp}: an empty directory; {exp}: a trained student; the others are made below
INFER = (
    "asr_inference --asr_train_config {exp}/config.yaml --asr_model_file {exp}/%s "
    "--output_dir {tmp}/out --num_workers 1 --data_path_and_name_and_type " % MODEL
)
DECODE = "decode --asr_exp {exp} --inference_tag t --inference_asr_model %s" % MODEL
CALIBRATE = "calibrate --asr_model_file {exp}/%s" % MODEL
REPORT = (
    "depth_report --data_root {root} --test_sets dev --inference_tag t "
    "--inference_asr_model %s --output_dir {tmp}/report" % MODEL
)
POSTERIORS = "collect_posteriors --output_dir {tmp}/cache"
SUPERB = "sfm_superb --upstream {bad} --upstream_name a --output_dir {tmp}/s"
TRAIN = "asr_train {train} --output_dir {tmp}/new"

BAD = [
    # decoding
    (INFER + "{bad}/nowhere.scp,speech,sound", "x is to be in /not/there.wav"),
    (INFER + "{bad}/text.scp,speech,sound", "text.scp: x is no audio"),
    (INFER + "{bad}/empty.scp,speech,sound", "empty.scp is empty: it has no utterance"),
    (INFER + "/not/there.scp,speech,sound", "/not/there.scp does not exist"),
    (INFER + "{bad}/later.scp,speech,sound", "decoding stopped: .*gone.wav"),
    (INFER + "{dev}/wav.scp,speech,sound --config {bad}/no.yaml", "is no YAML file"),
    (INFER + "{dev}/wav.scp,speech,sound --depth 9", "depth 9 is impossible"),
    (INFER + "{dev}/wav.scp,speech,sound --depth six", "argument --depth: 'six'"),
    (INFER + "{dev}/wav.scp,speech,sound --layers 0,7", "layers .*7"),
    (INFER + "{dev}/wav.scp,speech,sound --depth_profile {bad}/x.pth", "x.pth"),
    (INFER + "{dev}/wav.scp,speech,sound --layers even", "write layers from 0"),
    (
        "asr_inference --asr_train_config {exp}/config.yaml --asr_model_file /no.pth "
        "--output_dir {tmp}/out --data_path_and_name_and_type "
        "{dev}/wav.scp,speech,sound",
        "no checkpoint /no.pth",
    ),
    (
        "asr_inference --asr_train_config {exp}/config.yaml --asr_model_file "
        "{exp}/checkpoint.pth --output_dir {tmp}/out --data_path_and_name_and_type "
        "{dev}/wav.scp,speech,sound",
        "checkpoint.pth is no model .*: name an epoch's model",
    ),
    (
        "asr_inference --asr_train_config {bad}/fewer.yaml --asr_model_file {exp}/%s "
        "--output_dir {tmp}/out --data_path_and_name_and_type "
        "{dev}/wav.scp,speech,sound" % MODEL,
        "encoder weights that the config does not know",
    ),
    (DECODE + " --data_dirs {dev} --depths 4,x", "write numbers of layers"),
    (DECODE + " --data_dirs {dev} --depths 0", "write numbers of layers"),
    (DECODE + " --data_dirs {dev} --depths 5", "depth 5 is impossible"),
    (DECODE + " --data_dirs {bad} --depths 4", "has neither wav.scp nor feats.scp"),
    (DECODE + " --data_dirs {dev} --depths 4 --nj 0", "write an integer above 0"),
    (DECODE + " --data_dirs {bad}/lost --depths 4,2 --nj 2", "stopped: .*gone.wav"),
    (DECODE + " --data_dirs {dev} --depths 4 --inference_args=--beam", "--beam"),
    (
        DECODE
        + " --data_dirs {dev} --depths 4 --inference_args=--config={bad}/no.yaml",
        "--config is no YAML file",
    ),
    (
        DECODE + " --data_dirs {dev} --depths 4 --parallel_config {bad}/cluster.yaml",
        "cluster.yaml: env 'moon', choose from",
    ),
    # profiles and reports
    (CALIBRATE + " --data_dir {dev} --depths 9", r"none of the depths \[9\] fits 4"),
    (CALIBRATE + " --data_dir /not/there --depths 4", "/not/there has neither"),
    (CALIBRATE + " --data_dir {dev} --depths 4 --num_utts 0", "integer above 0"),
    (
        "calibrate --asr_model_file {static}/%s --data_dir {dev} --depths 4" % MODEL,
        "has no run-time depth",
    ),
    (REPORT + " --depths 4 --system exp", "--system exp: write NAME=PATH"),
    (REPORT + " --depths 4 --system a={exp}", "nothing is decoded on dev; looked for"),
    (REPORT + " --depths four --system a={exp}", "write numbers of layers"),
    # posteriors and training
    (POSTERIORS + " --reference /not/there --data_dirs {dev}", "no /not/there"),
    (POSTERIORS + " --reference {static} --data_dirs {bad}", "has neither wav.scp"),
    (POSTERIORS + " --reference {static} --data_dirs {dev} {dev}", "are in two of the"),
    (POSTERIORS + " --reference {static} --data_dirs {dev} --top_k 99", "top_k 99 is"),
    (POSTERIORS + " --reference {static} --data_dirs {dev} --ngpu 1", "ngpu 1: no GPU"),
    ("asr_train {train} --output_dir {bad}/text.txt", "it, or a part of it, is a file"),
    ("asr_train --config {bad}/no.yaml --output_dir {tmp}/new", "is no YAML file"),
    (
        "asr_train --output_dir {tmp}/new "
        "--config {bad}/no_train_data_path_and_name_and_type.yaml",
        "no train data: name them, as --train_data_path_and_name_and_type wav.scp,sp",
    ),
    (
        "asr_train --output_dir {tmp}/new --config {bad}/no_train_shape_file.yaml",
        "no lengths of the train data, .* --train_shape_file STATS/train/speech_shape",
    ),
    (TRAIN + " --ngpu 4", "--multiprocessing_distributed true"),
    (TRAIN + " --trainer growing", "invalid choice: 'growing'"),
    (TRAIN + " --model_conf reference=/not/there", "no /not/there"),
    (TRAIN + " --model_conf kd_temperature=0", "kd_temperature 0 is impossible"),
    (TRAIN + " --model_conf valid_depths=[9]", "9"),
    (TRAIN + " --encoder_conf keep_prob=2", "keep_prob 2"),
    (TRAIN + " --encoder_conf depth_sampler=some", "some"),
    (TRAIN + " --specaug_conf apply_time_warp=true", "apply_time_warp: false"),
    (TRAIN + " --token_list /not/there.txt", "/not/there.txt"),
    (TRAIN + " --init_param /not/there.pth", "/not/there.pth"),
    # data
    ("format_data {bad} {tmp}/out", "has neither wav.scp nor feats.scp"),
    ("format_data {data} {tmp}/out --fs fast", "write a sampling rate in Hz"),
    ("format_data {data} {tmp}/out --nj -1", "integer above 0"),
    ("format_data {data} {exp}", "holds other files, which this step did not write"),
    (
        "format_data {bad}/command {tmp}/out",
        r"u \(command failed: cat: u.wav: No such file",
    ),
    ("format_data {bad}/twice {tmp}/out", "line 2: u is there twice"),
    ("format_data {bad}/unlike {tmp}/out", "lacks 1 key.*mend the data preparation"),
    ("format_data {bad}/latin {tmp}/out", "is not UTF-8"),
    ("filter_data --fs 16000 /not/there {tmp}/out", "/not/there does not exist"),
    ("validate_data {bad}/unlike", "lacks 1 key"),
    ("perturb_speed --factors fast {data} {tmp}/sp", "speed factor 'fast'"),
    (
        "make_token_list --text /no/text --output {tmp}/t/tokens.txt",
        "/no/text does not",
    ),
    (
        "make_token_list --text {dev}/text --nbpe 9999 --output {tmp}/t/tokens.txt",
        "can not learn 9999 units",
    ),
    ("merge_config {bad}/no.yaml", "no.yaml"),
    ("merge_config /not/there.yaml", "/not/there.yaml"),
    # packs
    (
        "pack asr --model_file {exp}/%s --outpath {exp}/x.zip --data_dir {dev}" % MODEL,
        "holds other files",
    ),
    (
        "pack asr --model_file /no.pth --outpath {tmp}/p/x.zip --data_dir {dev}",
        "/no.pth",
    ),
    # foundation models
    ("sfm_distill_train {sfm} --output_dir {tmp}/new", "model_conf names no teacher"),
    (
        "sfm_distill_train {sfm} --output_dir {tmp}/new --model_conf teacher=/no/model",
        "no teacher /no/model",
    ),
    (
        "sfm_collect_targets --teacher {bad} --layers 1 --data_dirs {dev} "
        "--output_dir {tmp}/targets",
        "it has neither config.json",
    ),
    ("sfm_cut_data {data} {tmp}/o --max_seconds 2 --audio_format mp9", "'mp9'"),
    ("sfm_teacher_loss --config /no.yaml", "/no.yaml can not be read: No such file"),
    ("sfm_export --model_file /no.pth --output_dir {tmp}/hf", "no /config.yaml: name"),
    (
        "sfm_probe --upstream a --digits {dev} {dev} --strings {dev} {dev} "
        "--output_dir {tmp}/probe",
        "--upstream a: write NAME=PATH",
    ),
    (SUPERB, "corp"),
    (SUPERB + " --er_folds 5", "write folds from 0 to 4"),
]


@pytest.fixture(scope="module")
def places(corpus, static, student, tmp_path_factory):
    """What the placeholders of the table stand for."""
    bad = tmp_path_factory.mktemp("bad")
    (bad / "text.txt").write_text("this is no audio\n" * 99)
    (bad / "empty.scp").write_text("")
    (bad / "nowhere.scp").write_text("x /not/there.wav\n")
    (bad / "text.scp").write_text(f"x {bad}/text.txt\n")
    (bad / "later.scp").write_text(f"x {corpus.dev}/x.wav\ny {bad}/gone.wav\n")
    (bad / "no.yaml").write_text("a: [1\n")
    (bad / "cluster.yaml").write_text("env: moon\n")
    config = yaml.safe_load((student / "config.yaml").read_text())
    config["encoder_conf"]["num_blocks"] = 3
    for name in ("feats_stats.npz", "tokens.txt"):
        if (student / name).is_file():
            shutil.copy(student / name, bad)
    (bad / "fewer.yaml").write_text(yaml.safe_dump(config))
    (bad / "lost").mkdir()
    shutil.copy(bad / "later.scp", bad / "lost" / "wav.scp")
    good = dict(wav="u {wav}\n", text="u one\n", spk="u s\n")
    wav = bad / "u.wav"
    soundfile.write(wav, corpus.speech("a"), 8000)
    for name, changes in dict(
        data={},
        command=dict(wav="u cat u.wav |\n"),
        twice=dict(wav="u {wav}\nu {wav}\n"),
        unlike=dict(text="u one\nv two\n"),
        latin=dict(text="u ein f\xfcnf\n"),
    ).items():
        tables = {**good, **changes}
        (bad / name).mkdir()
        (bad / name / "wav.scp").write_text(tables["wav"].format(wav=wav))
        (bad / name / "text").write_text(tables["text"], encoding="latin-1")
        (bad / name / "utt2spk").write_text(tables["spk"])
    train = corpus.training(
        bad / "training",
        encoder="ld_conformer",
        model="dld",
        model_conf=dict(reference=str(static)),
        max_epoch=1,
    )
    config = yaml.safe_load(open(train[1]))
    for left_out in ("train_shape_file", "train_data_path_and_name_and_type"):
        del config[left_out]
        (bad / f"no_{left_out}.yaml").write_text(yaml.safe_dump(config))
    sfm = {}
    for part, path in (("train", corpus.train), ("valid", corpus.dev)):
        entry = [str(path / "wav.scp"), "speech", "sound"]
        sfm[f"{part}_data_path_and_name_and_type"] = [entry]
        sfm[f"{part}_shape_file"] = [str(path / "utt2num_samples")]
    (bad / "sfm.yaml").write_text(yaml.safe_dump(sfm))
    # a copy, because a command that is refused late may have begun a directory
    exp = shutil.copytree(student, bad / "exp", symlinks=True)
    return dict(
        bad=bad,
        data=bad / "data",
        exp=exp,
        static=static,
        dev=corpus.dev,
        root=corpus.root,
        train=" ".join(train[:2]),
        sfm=f"--config {bad}/sfm.yaml",
    )


@pytest.mark.parametrize("command, message", BAD, ids=[c for c, _ in BAD])
def test_is_refused_in_one_line(places, tmp_path, capsys, command, message):
    if "--ngpu 1" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    name, *args = command.format(**places, tmp=tmp_path).split()
    before = {path: path.stat().st_mtime_ns for path in places["exp"].iterdir()}
    main = importlib.import_module(f"dldkit.bin.{name}").main
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code in (1, 2)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.search(rf"^[\w.-]*:? ?error: .*{message}", last), last
    after = {path: path.stat().st_mtime_ns for path in places["exp"].iterdir()}
    for path in after.keys() | before.keys():
        assert path.name == "t" or after[path] == before[path]
