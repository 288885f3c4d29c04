"""The tasks of SUPERB, and the corpora that they need."""

from dataclasses import dataclass
from typing import Optional

from dldkit.data.librispeech import SUPERB


@dataclass(frozen=True)
class Corpus:
    """A corpus that the user has: what to look for in it, and where to get it."""

    holds: tuple[str, ...]  # paths that must be in it
    source: str  # address and licence
    parent_of: str = ""  # the directory above this one may be named as well


CORPORA = {
    "librispeech": Corpus(
        ("SPEAKERS.TXT", *SUPERB),
        "https://www.openslr.org/12, licence CC BY 4.0",
        parent_of="LibriSpeech",
    ),
    "speech_commands": Corpus(
        ("_background_noise_",),
        "http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz, "
        "licence CC BY 4.0",
    ),
    "speech_commands_test": Corpus(
        ("_silence_",),
        "http://download.tensorflow.org/data/speech_commands_test_set_v0.01.tar.gz, "
        "licence CC BY 4.0",
    ),
    "fluent_speech_commands": Corpus(
        ("data/train_data.csv",),
        "https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-"
        "understanding-research, licence: academic research only",
    ),
    "voxceleb1": Corpus(
        ("dev/wav",),
        "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html, on request, "
        "licence CC BY 4.0; unpacked into dev/wav and test/wav",
    ),
    "iemocap": Corpus(
        ("Session1",),
        "https://sail.usc.edu/iemocap, on request, licence: USC's own, research only",
    ),
    "snips": Corpus(
        ("all.iob.snips.txt",),
        "https://github.com/aws-samples/aws-lex-noisy-spoken-language-understanding, "
        "see its LICENSE; converted to wav by s3prl's preprocess/snips_prepare_data.sh",
    ),
    "libri2mix": Corpus(
        ("train/segments",),
        "https://github.com/ftshijt/LibriMix, licence CC BY 4.0; the Kaldi directories "
        "train, dev and test of its scripts/prepare_diarization.py",
    ),
}

_VOX = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt"
_TRIALS = "https://openslr.magicdatatech.com/resources/49/voxceleb1_test_v2.txt"
_LEXICON = "https://huggingface.co/datasets/s3prl/g2p/raw/main/lexicon"
_IEMOCAP = (
    "https://huggingface.co/datasets/s3prl/iemocap_split/raw/"
    "4097f2b496c41eed016d4e5eb0ada4cccd46d1f3"
)
LEXICONS = ("librispeech-lexicon-200k-g2p.txt", "librispeech-lexicon-allothers-g2p.txt")


@dataclass(frozen=True)
class Task:
    """A task of SUPERB, as s3prl runs it.

    `corpora` maps options of s3prl's prepare_data to names in CORPORA; `lists` maps
    names of files that s3prl needs besides to their addresses; `columns` maps headings
    of the table to keys of the file `result`, and to the factor that makes percent.
    """

    problem: str
    corpora: dict[str, str]
    columns: dict[str, tuple[str, float]]
    result: str = "evaluate/valid_best/*/result.yaml"
    lists: Optional[dict[str, str]] = None
    folds: int = 0


def _iemocap_lists() -> dict[str, str]:
    return {
        f"test_session{session}_{part}_metadata.json": (
            f"{_IEMOCAP}/Session{session}/{part}_meta_data.json"
        )
        for session in range(1, 6)
        for part in ("train", "test")
    }


# In the order of the columns in SUPERB's table (Yang et al., Interspeech 2021).
TASKS = {
    "pr": Task(
        "SuperbPR",
        {"dataset_root": "librispeech"},
        {"PR PER ↓": ("per", 100)},
        lists={name: f"{_LEXICON}/{name}" for name in LEXICONS},
    ),
    "ks": Task(
        "SuperbKS",
        {"gsc1": "speech_commands", "gsc1_test": "speech_commands_test"},
        {"KS acc ↑": ("accuracy", 100)},
    ),
    "ic": Task(
        "SuperbIC",
        {"dataset_root": "fluent_speech_commands"},
        {"IC acc ↑": ("accuracy", 100)},
    ),
    "sid": Task(
        "SuperbSID",
        {"dataset_root": "voxceleb1"},
        {"SID acc ↑": ("accuracy", 100)},
        lists={"iden_split.txt": _VOX},
    ),
    "er": Task(
        "SuperbER",
        {"iemocap": "iemocap"},
        {"ER acc ↑": ("accuracy", 100)},
        lists=_iemocap_lists(),
        folds=5,
    ),
    "asr": Task(
        "SuperbASR",
        {"dataset_root": "librispeech"},
        {"ASR WER ↓": ("wer", 100)},
    ),
    "qbe": Task("", {}, {"QbE MTWV ×100 ↑": ("", 100)}),  # not in s3prl.problem
    "sf": Task(
        "SuperbSF",
        {"dataset_root": "snips"},
        {"SF F1 ↑": ("slot_type_f1", 100), "SF CER ↓": ("slot_value_cer", 100)},
    ),
    "asv": Task(
        "SuperbASV",
        {"dataset_root": "voxceleb1"},
        {"ASV EER ↓": ("EER", 100)},
        result="evaluate/test_trial/best_result.yaml",
        lists={"iden_split.txt": _VOX, "voxceleb1_test_v2.txt": _TRIALS},
    ),
    "sd": Task(
        "SuperbSD",
        {"data_dir": "libri2mix"},
        {"SD DER ↓": ("der", 1)},  # dscore reports percent
        result="evaluate/valid_best/*/dscore.yaml",
    ),
}
