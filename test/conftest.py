"""Real speech, and tiny models trained on it, shared by all tests."""

import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.train.collate_fn import common_collate_fn
from espnet2.train.dataset import ESPnetDataset

torch.set_num_threads(1)  # the models are tiny

ROOT = Path(__file__).resolve().parents[1]
RATE = 8000
WORDS = "zero one two three four five six seven eight nine".split()
TRAIN = dict(a="03", b="14", c="259", d="36", e="478", f="5", g="062", h="71", i="904")
DEV = dict(x="29", y="830", z="41")

CONFIG: dict[str, Any] = dict(
    token_type="word",
    frontend_conf=dict(fs=RATE, n_fft=256, hop_length=128, n_mels=20),
    specaug="specaug",
    specaug_conf=dict(
        apply_time_warp=False,
        freq_mask_width_range=[0, 4],
        time_mask_width_range=[0, 4],
    ),
    encoder="conformer",
    encoder_conf=dict(
        output_size=8,
        attention_heads=2,
        linear_units=16,
        num_blocks=4,
        cnn_module_kernel=3,
        macaron_style=True,
        dropout_rate=0.1,
    ),
    model_conf=dict(ctc_weight=1.0, report_cer=False, report_wer=False),
    optim="adam",
    optim_conf=dict(lr=0.005),
    scheduler="warmuplr",
    scheduler_conf=dict(warmup_steps=5),
    batch_type="unsorted",
    batch_size=3,
    num_workers=0,
    max_epoch=3,
    resume=True,
    keep_nbest_models=2,
    best_model_criterion=[["valid", "loss_ctc", "min"]],
    use_matplotlib=False,
    use_tensorboard=False,
    num_att_plot=0,
    seed=3,
)


@dataclass
class Corpus:
    """Connected digits in ESPnet's data directories, and configs that fit them."""

    root: Path
    train: Path
    dev: Path
    tokens: Path
    config: dict[str, Any] = field(default_factory=lambda: deepcopy(CONFIG))

    def training(self, directory: Path, **changes: Any) -> list[str]:
        """Return asr_train's arguments.

        Dicts among `changes` extend those of the config; None takes an entry away.
        """
        config = deepcopy(self.config)
        for key, value in changes.items():
            if isinstance(config.get(key), dict):
                value = {**config[key], **value}
                value = {k: v for k, v in value.items() if v is not None}
            config[key] = value
        config.setdefault("token_list", str(self.tokens))
        for part, path in (("train", self.train), ("valid", self.dev)):
            config[f"{part}_data_path_and_name_and_type"] = [
                [str(path / "wav.scp"), "speech", "sound"],
                [str(path / "text"), "text", "text"],
            ]
            config[f"{part}_shape_file"] = [str(path / "utt2num_samples")]
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = directory.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config))
        return ["--config", str(file), "--output_dir", str(directory)]

    def speech(self, utt: str) -> np.ndarray:
        """Return the samples of an utterance."""
        data = self.train if utt in TRAIN else self.dev
        return soundfile.read(data / f"{utt}.wav", dtype="float32")[0]


def spoken_digit(digit: str, rng: np.random.Generator) -> np.ndarray:
    """Return a recording of the digit; without $FSDD, a chord that stands for it."""
    fsdd = os.environ.get("FSDD")
    if fsdd:
        file = Path(fsdd) / "recordings" / f"{digit}_jackson_{rng.integers(50)}.wav"
        return soundfile.read(file, dtype="float32")[0]
    time = np.arange(int(RATE * rng.uniform(0.3, 0.5))) / RATE
    pitches = 200 * np.array([1, 1 + int(digit), 3 + 2 * int(digit)])
    chord = np.sin(2 * np.pi * pitches[:, None] * time).sum(0)
    return (0.1 * chord + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """Nine utterances for training and three for validation."""
    root = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for name, utterances in (("train", TRAIN), ("dev", DEV)):
        directory = root / name
        directory.mkdir()
        tables: dict[str, list[str]] = dict(wav=[], text=[], length=[])
        for utt, digits in utterances.items():
            samples = np.concatenate([spoken_digit(d, rng) for d in digits])
            wav = directory / f"{utt}.wav"
            soundfile.write(wav, samples, RATE)
            tables["wav"].append(f"{utt} {wav}")
            tables["text"].append(f"{utt} {' '.join(WORDS[int(d)] for d in digits)}")
            tables["length"].append(f"{utt} {len(samples)}")
        for file, table in zip(("wav.scp", "text", "utt2num_samples"), tables.values()):
            (directory / file).write_text("\n".join(table) + "\n")
    tokens = root / "tokens.txt"
    tokens.write_text("\n".join(["<blank>", "<unk>", *WORDS, "<sos/eos>"]) + "\n")
    return Corpus(root, root / "train", root / "dev", tokens)


@pytest.fixture(scope="session")
def shar(corpus) -> Path:
    """The utterances for training in lhotse's Shar format: three shards of three."""
    from lhotse import CutSet, Recording

    files = [corpus.train / f"{utt}.wav" for utt in TRAIN]
    cuts = CutSet([Recording.from_file(file).to_cut() for file in files])
    (corpus.root / "shar").mkdir()
    cuts.to_shar(corpus.root / "shar", {"recording": "flac"}, shard_size=3)
    return corpus.root / "shar"


@pytest.fixture(scope="session")
def bpe(corpus) -> dict[str, str]:
    """Options of a training with BPE units, which were learnt on the corpus."""
    from dldkit.bin.make_token_list import main

    tokens, model = (
        corpus.root / "bpe" / "tokens.txt",
        corpus.root / "bpe" / "bpe.model",
    )
    tokens.parent.mkdir()
    files = ["--text", str(corpus.train / "text"), "--output", str(tokens)]
    main([*files, "--token_type", "bpe", "--nbpe", "20"])
    return dict(token_type="bpe", token_list=str(tokens), bpemodel=str(model))


@pytest.fixture(scope="session")
def python():
    """Return a function that runs `python ARGS...` and checks its exit status."""

    def run(*args, status: int = 0, **kwargs) -> subprocess.CompletedProcess:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.run(
            [sys.executable, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=900,
            env=environment,
            **kwargs,
        )
        assert process.returncode == status, process.stdout + process.stderr
        return process

    return run


@pytest.fixture(scope="session")
def static(corpus) -> Path:
    """The experiment directory of ESPnet's own Conformer: a reference."""
    from dldkit.bin.asr_train import main

    directory = corpus.root / "exp" / "asr_static"
    main(corpus.training(directory))
    return directory


@pytest.fixture(scope="session")
def dld_training(corpus, static):
    """Return a function that gives the arguments of the DLD student's training."""

    def arguments(directory: Path, **changes: Any) -> list[str]:
        model_conf = {"reference": str(static), **changes.pop("model_conf", {})}
        return corpus.training(
            directory,
            **{
                "encoder": "ld_conformer",
                "model": "dld",
                "model_conf": model_conf,
                **changes,
            },
        )

    return arguments


@pytest.fixture(scope="session")
def student(corpus, python, dld_training) -> Path:
    """The experiment directory of a student distilled from `static`."""
    directory = corpus.root / "exp" / "asr_dld"
    python("-m", "dldkit.bin.asr_train", *dld_training(directory))
    return directory


ENCODERS: dict[str, dict[str, Any]] = dict(
    conformer=dict(linear_units=16, cnn_module_kernel=3, macaron_style=True),
    transformer=dict(linear_units=16),
    branchformer=dict(cgmlp_linear_units=16, cgmlp_conv_kernel=3),
    e_branchformer=dict(
        linear_units=16,
        cgmlp_linear_units=16,
        cgmlp_conv_kernel=3,
        use_ffn=True,
        macaron_ffn=True,
    ),
)


@pytest.fixture(params=list(ENCODERS))
def encoder_name(request) -> str:
    """Each of ESPnet's encoders that dldkit knows."""
    return request.param


@pytest.fixture
def encoder_sizes(encoder_name) -> dict[str, Any]:
    """Options that turn those of the corpus' Conformer into those of the encoder."""
    theirs = ENCODERS[encoder_name]
    return {**dict.fromkeys(set(ENCODERS["conformer"]) - set(theirs)), **theirs}


@pytest.fixture
def make_encoder():
    """Return a function that builds an encoder by its name in a config."""
    from espnet2.tasks.asr import encoder_choices

    import dldkit

    dldkit.register()

    def make(name: str, num_blocks: int = 4, seed: int = 0, **options: Any):
        cls = encoder_choices.get_class(name)
        sizes = ENCODERS[name.removeprefix("ld_")]
        torch.manual_seed(seed)
        return cls(
            input_size=20,
            output_size=8,
            attention_heads=2,
            num_blocks=num_blocks,
            **{**sizes, **options},
        )

    return make


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Features (Batch, Time, Dim) of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 60, 20, generator=generator), torch.tensor([60, 41, 52])


@pytest.fixture
def build(corpus, tmp_path):
    """Return a function that builds an untrained model from a changed config.

    With a `directory`, it is saved there as a trained experiment would be.
    """
    from espnet2.utils.yaml_no_alias_safe_dump import yaml_no_alias_safe_dump

    from dldkit.tasks.asr import DLDASRTask

    def model(seed: int = 0, directory: Path | None = None, **changes: Any):
        parser = DLDASRTask.get_parser()
        args = parser.parse_args(corpus.training(tmp_path / "untrained", **changes))
        torch.manual_seed(seed)
        model = DLDASRTask.build_model(args)
        if directory is not None:
            directory.mkdir(parents=True)
            with open(directory / "config.yaml", "w") as file:
                yaml_no_alias_safe_dump(vars(args), file)
            torch.save(model.state_dict(), directory / "valid.loss_ctc.best.pth")
        return model

    return model


@pytest.fixture
def batch(corpus):
    """Return a function that pads utterances to a batch, as the trainer does.

    With a `cache`, the batch has the posteriors of that directory, read by ESPnet.
    """
    import dldkit

    dldkit.register()

    def padded(*utts: str, device: str = "cpu", cache=None) -> dict[str, Any]:
        stored = {}
        if cache is not None:
            entry = (f"{cache}/posteriors.scp", "posteriors", "numpy_ark")
            data = ESPnetDataset([entry])
            stored = common_collate_fn([data[u] for u in utts], int_pad_value=-1)[1]
            stored = {name: value.to(device) for name, value in stored.items()}
        speech = [torch.from_numpy(corpus.speech(utt)) for utt in utts]
        digits = [{**TRAIN, **DEV}[utt] for utt in utts]
        text = [torch.tensor([2 + int(d) for d in ds]) for ds in digits]
        pad = torch.nn.utils.rnn.pad_sequence
        return dict(
            speech=pad(speech, batch_first=True).to(device),
            speech_lengths=torch.tensor([len(s) for s in speech], device=device),
            text=pad(text, batch_first=True, padding_value=-1).to(device),
            text_lengths=torch.tensor([len(t) for t in text], device=device),
            utt_id=list(utts),
            **stored,
        )

    return padded
