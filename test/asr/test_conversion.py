"""A stock ESPnet model becomes the start of a training of variable depth."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from espnet2.tasks.asr import ASRTask
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
from omegaconf import OmegaConf

from dldkit.asr.conversion import (
    converted,
    name_of,
    opened,
    refuse_other_features,
    refuse_unfit,
    student_config,
)
from dldkit.bin import start_from
from dldkit.bin.asr_train import main as train
from dldkit.config_files import merge_configs
from dldkit.errors import UserError
from dldkit.tasks.asr import DLDASRTask

CONFORMER = ("linear_units", "cnn_module_kernel", "macaron_style")
ROOT = Path(__file__).resolve().parents[2]

RECIPE = dict(
    encoder="ld_transformer",
    encoder_conf=dict(num_blocks=12, output_size=48, dropout_rate=0.7),
    model_conf=dict(ctc_weight=1.0, report_cer=False, report_wer=False),
    specaug=None,
    optim="adamw",
    optim_conf=dict(lr=0.002),
    batch_type="unsorted",
    batch_size=5,
    max_epoch=1,
    num_workers=0,
    num_att_plot=0,
    use_matplotlib=False,
    best_model_criterion=[["valid", "loss_ctc", "min"]],
    unused_parameters=True,
)


@pytest.fixture(scope="module")
def stock(corpus, bpe, python, tmp_path_factory):
    """ESPnet's own CTC/attention model with BPE, and its packed zip elsewhere.

    It has what may not go over to a training of variable depth: time warp, intermediate
    CTC, and a layer_drop_rate.
    """
    root = tmp_path_factory.mktemp("stock")
    for option in ("token_list", "bpemodel"):
        shutil.copy(bpe[option], root)
    rng = np.random.default_rng(0)
    frames = rng.normal(-5, 3, (500, 20))
    np.savez(
        root / "stats.npz",
        count=len(frames),
        sum=frames.sum(0),
        sum_square=(frames**2).sum(0),
    )
    command = corpus.training(
        root / "asr_stock",
        token_type="bpe",
        token_list="tokens.txt",
        bpemodel="bpe.model",
        normalize="global_mvn",
        normalize_conf=dict(stats_file="stats.npz"),
        specaug_conf=dict(apply_time_warp=True),
        encoder_conf=dict(interctc_layer_idx=[2], layer_drop_rate=0.1),
        decoder="transformer",
        decoder_conf=dict(attention_heads=2, linear_units=16, num_blocks=1),
        model_conf=dict(ctc_weight=0.3, interctc_weight=0.3, lsm_weight=0.1),
        max_epoch=1,
    )
    python("-m", "espnet2.bin.asr_train", *command, cwd=root)
    words = "asr --asr_train_config asr_stock/config.yaml --asr_model_file "
    words += "asr_stock/valid.loss_ctc.ave.pth --option bpe.model --option stats.npz"
    python("-m", "espnet2.bin.pack", *words.split(), "--outpath", "a.zip", cwd=root)
    return root


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """An empty directory with a training config, to work in."""
    (tmp_path / "recipe").mkdir()
    monkeypatch.chdir(tmp_path / "recipe")
    with open("train.yaml", "w") as file:
        yaml.safe_dump(RECIPE, file)
    return tmp_path / "recipe"


def start(model, recipe, system="anytime"):
    """Prepare as asr.sh does; return the checkpoint, and the student's config."""
    outpath = recipe / "exp/asr_start/valid.loss_ctc.ave.pth"
    where = ["--asr_config", "train.yaml", "--outpath", str(outpath)]
    start_from.main([str(model), *where])
    parts = [outpath.with_name("student.yaml"), ROOT / f"conf/systems/{system}.yaml"]
    settings = [f"model_conf.reference={outpath}", "init_param=[]"]
    return outpath, merge_configs([*map(str, parts), *settings])


def train_command(corpus, config, outpath):
    """Return the arguments of the student's training, with the data of the corpus."""
    file = outpath.with_name("merged.yaml")
    file.write_text(OmegaConf.to_yaml(config))
    command = ["--config", str(file), "--output_dir", str(outpath.parents[1] / "asr")]
    command += ["--init_param", str(outpath), "--frontend_conf", "fs=8000"]
    for part, data in (("train", corpus.train), ("valid", corpus.dev)):
        for table in ("wav.scp,speech,sound", "text,text,text"):
            command += [f"--{part}_data_path_and_name_and_type", f"{data}/{table}"]
        command += [f"--{part}_shape_file", f"{data}/utt2num_samples"]
    return command


@pytest.mark.parametrize("name", ["asr_stock", "asr_stock/1epoch.pth", "a.zip"])
def test_the_student_begins_as_the_model_that_it_was(
    stock, corpus, recipe, batch, monkeypatch, name
):
    with monkeypatch.context() as patch:
        patch.chdir(stock)  # its config has relative paths
        model, _ = ASRTask.build_model_from_file(
            "asr_stock/config.yaml", "asr_stock/1epoch.pth"
        )
    source = stock / name
    if name == "a.zip":  # elsewhere, without the files that it was made from
        source = shutil.copy(source, recipe)
    outpath, config = start(source, recipe)
    speech = {k: v for k, v in batch("a", "b").items() if k.startswith("speech")}

    command = train_command(corpus, config, outpath)
    args = DLDASRTask.get_parser().parse_args(command)
    student = DLDASRTask.build_model(args)
    load_pretrained_model(str(outpath), student, ignore_init_mismatch=False)

    assert type(model.encoder).__name__ == "ConformerEncoder"
    assert len(student.encoder.gates) == 4 and student.exits == (2,)
    assert model.state_dict().keys() == student.state_dict().keys()
    with torch.no_grad():
        (expected, _), lengths = model.eval().encode(**speech)
        encoded, student_lengths = student.eval().encode(**speech)
        assert torch.equal(encoded, expected)
        assert torch.equal(student_lengths, lengths)
        text = torch.ones(2, 3).long(), torch.tensor([3, 3])
        logits, _ = model.decoder(expected, lengths, *text)
        assert torch.equal(student.decoder(encoded, lengths, *text)[0], logits)
    train(command)


def test_all_four_encoders(build, encoder_name, encoder_sizes, batch, tmp_path):
    """Built from the student's config, they give what ESPnet's encoders give."""
    sizes = dict(encoder_sizes, num_blocks=3)
    exp = tmp_path / "asr_theirs"
    model = build(directory=exp, encoder=encoder_name, encoder_conf=sizes, seed=1)
    with opened(str(exp)) as (config, checkpoint):
        student = student_config(RECIPE, config)
    assert checkpoint == exp / "valid.loss_ctc.best.pth"
    assert student["encoder"] == f"ld_{encoder_name}"
    assert "dropout_rate" in student["encoder_conf"]  # the model's, not the recipe's
    assert student["encoder_conf"] == config["encoder_conf"]
    nested = dict(depth_sampler="uniform", layer_choice="prefix", exits=1)
    ours = build(
        encoder=student["encoder"],
        encoder_conf={**dict.fromkeys(CONFORMER), **student["encoder_conf"], **nested},
        model="dld",
    )
    ours.load_state_dict(model.state_dict())
    speech = {k: v for k, v in batch("a", "b").items() if k.startswith("speech")}
    with torch.no_grad():
        expected, _ = model.eval().encode(**speech)
        encoded, _ = ours.eval().encode(**speech)
    assert torch.equal(encoded, expected)


def test_a_pretrained_encoder_that_was_fine_tuned(build, batch, tmp_path):
    """The student needs no pretrained model any more."""
    from transformers import HubertConfig, HubertModel

    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    sizes |= dict(intermediate_size=32, conv_dim=[8] * 7)
    sizes |= dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    HubertModel(HubertConfig(**sizes)).save_pretrained(tmp_path / "hubert")
    waves = dict(input_size=1, specaug=None, normalize=None)
    waves |= dict(frontend_conf=dict(fs=16000))
    espnets = "output_size attention_heads dropout_rate num_blocks".split()
    conf = {**dict.fromkeys((*CONFORMER, *espnets)), "layer_weights": "weighted_sum"}
    conf |= dict(model=str(tmp_path / "hubert"), depth_sampler="full")
    exp = tmp_path / "asr_static"
    model = build(directory=exp, encoder="ld_hf", encoder_conf=conf, **waves)
    shutil.rmtree(tmp_path / "hubert")
    with opened(str(exp)) as (config, _):
        refuse_unfit("it", config)
        refuse_other_features("it", config, "raw", 16000, 80)
        with pytest.raises(UserError, match="it takes audio, and --feats_type is fb"):
            refuse_other_features("it", config, "fbank", 16000, 1)
        student = student_config(RECIPE, config)
    assert student["encoder"] == "ld_hf" and student["input_size"] == 1
    assert student["encoder_conf"]["layer_weights"] == "weighted_sum"
    assert student["encoder_conf"]["num_blocks"] == 3
    nested = dict(depth_sampler="uniform", layer_choice="prefix", exits=1)
    none = {name: conf.get(name) for name in (*CONFORMER, *espnets)}
    ours = build(
        encoder="ld_hf",
        encoder_conf={**none, **student["encoder_conf"], **nested},
        model="dld",
        seed=1,
        **waves,
    )
    ours.load_state_dict(model.state_dict())
    speech = {k: v for k, v in batch("a", "b").items() if k.startswith("speech")}
    with torch.no_grad():
        expected, _ = model.eval().encode(**speech)
        assert torch.equal(ours.eval().encode(**speech)[0], expected)


CONFIG = dict(
    token_type="bpe",
    token_list=["<blank>", "<unk>", "a", "<sos/eos>"],
    frontend_conf=dict(fs="16k"),
    encoder="conformer",
    encoder_conf=dict(output_size=8),
    ctc_conf=dict(ctc_type="gtnctc", dropout_rate=0.2),
    model_conf=dict(ctc_weight=0.3, lsm_weight=0.1),
    optim="sgd",
    max_epoch=70,
    init="xavier_uniform",
)


def test_the_recipe_says_how_to_train_and_the_model_what():
    student = student_config(RECIPE, CONFIG)
    for name in ("optim", "max_epoch", "batch_size", "unused_parameters"):
        assert student[name] == RECIPE[name]
    assert "init" not in student and "specaug" not in student
    for name in ("token_type", "token_list", "frontend_conf"):
        assert student[name] == CONFIG[name]
    assert student["encoder_conf"] == dict(output_size=8, num_blocks=6)  # ESPnet's
    reports = dict(report_cer=False, report_wer=False)
    assert student["model_conf"] == dict(ctc_weight=0.3, lsm_weight=0.1, **reports)
    assert student["ctc_conf"] == dict(ctc_type="builtin", dropout_rate=0.2)


def test_how_a_model_of_ours_drew_its_depth_stays_behind():
    config = {
        **CONFIG,
        "model": "dld",
        "encoder": "ld_conformer",
        "encoder_conf": dict(output_size=8, num_blocks=4, depth_sampler={4: 1, 2: 1}),
        "model_conf": dict(ctc_weight=1.0, reference="exp/gone", kd_weight=0.5),
    }
    config["encoder_conf"] |= dict(layer_choice="prefix", exits=[2])
    student = student_config(RECIPE, config)
    assert student["encoder_conf"] == dict(output_size=8, num_blocks=4)
    assert set(student["model_conf"]) == {"ctc_weight", "report_cer", "report_wer"}
    assert "model" not in student
    assert converted(config)["encoder_conf"]["depth_sampler"] == "full"
    assert config["model_conf"]["kd_weight"] == 0.5  # it is as it was


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(encoder="contextual_block_conformer"), "its encoder is contextual_block"),
        (dict(encoder="rnn"), "choose a model with one of conformer, transformer"),
        (dict(decoder="transducer"), "it is a transducer; choose a CTC"),
        (dict(model="maskctc"), "it is a maskctc model"),
        (dict(model_conf=dict(ctc_weight=0.0)), "trained without CTC"),
        (dict(token_type="whisper_multilingual"), "its token_type is whisper"),
        (dict(postencoder="hugging_face_transformers"), "it has a postencoder"),
        (dict(encoder_conf=dict(interctc_use_conditioning=True)), "conditioned on"),
        (dict(model_conf=dict(shared_head=False)), "an output layer for each exit"),
    ],
)
def test_refuses_what_can_not_be_anytime(changes, message):
    with pytest.raises(UserError, match=f"^exp/x can not be started from: .*{message}"):
        refuse_unfit("exp/x", {**CONFIG, **changes})


@pytest.mark.parametrize(
    "changes, recipe, message",
    [
        ({}, ("raw", 8000, 80), "x takes audio of 16000 Hz, and --fs is 8000"),
        ({}, ("fbank", 16000, 80), "x takes audio, and --feats_type is fbank: .* raw"),
        (dict(input_size=80), ("raw", 16000, 80), "of 80 dimensions, .* fbank or extr"),
        (dict(input_size=80), ("fbank", 16000, 40), "dimensions, and --n_mels is 40"),
    ],
)
def test_refuses_other_features(changes, recipe, message):
    with pytest.raises(UserError, match=message):
        refuse_other_features("x", {**CONFIG, **changes}, *recipe)


@pytest.mark.parametrize("features", ["fbank", "extracted", "raw"])
def test_takes_features_that_fit(features):
    size = None if features == "raw" else 80
    refuse_other_features("x", {**CONFIG, "input_size": size}, features, 16000, 80)


def test_names_of_what_starts_from_a_model(tmp_path):
    exp = tmp_path / "exp" / "asr_static"
    exp.mkdir(parents=True)
    for file in ("my model.zip", "exp/asr_static/5epoch.pth"):
        (tmp_path / file).touch()
    assert name_of(f"{exp}/") == "from_static"
    assert name_of(f"{exp}/5epoch.pth") == "from_static_5epoch"
    assert name_of(f"{tmp_path}/my model.zip") == "from_my_model"
    assert name_of("someone/their_model") == "from_someone_their_model"


def test_refuses_what_is_no_model(tmp_path):
    (tmp_path / "alone.pth").touch()
    (tmp_path / "text.zip").write_text("this is no zip")
    with zipfile.ZipFile(tmp_path / "tts.zip", "w") as archive:
        meta = dict(files=dict(tts_model_file="a.pth"), yaml_files={})
        archive.writestr("meta.yaml", yaml.safe_dump(meta))
        archive.writestr("a.pth", "weights")
    for name, message in (
        ("", "no trained model"),
        ("alone.pth", "alone.pth can not be used: there is no .*config.yaml"),
        ("text.zip", "text.zip is no packed model"),
        ("tts.zip", "tts.zip holds no model of ESPnet's ASR"),
        ("nope", "nope is no directory or file here, and could not be had from Hugg"),
    ):
        with pytest.raises(UserError, match=message):
            with opened(f"{tmp_path}/{name}"):
                pass
