"""Options that all recipes have."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from dldkit.errors import UserError
from dldkit.options import sampling_rate
from dldkit.recipe.values import (
    UNSET,
    by_name,
    check_directory,
    check_file,
    check_integer,
    number,
    parsed,
    words_of,
)

CHOICES = {
    "feats_type": ["raw", "fbank", "extracted"],
    "audio_format": ["flac", "wav", "flac.ark", "wav.ark"],
    "token_type": ["char", "bpe", "word"],
    "bpemode": ["unigram", "bpe"],
    "kd_source": ["live", "cached"],
    "targets": ["live", "cached", "cached_features"],
    "targets_dtype": ["float16", "int8"],
    "feats_normalize": ["global_mvn", "utterance_mvn", "none"],
    "selector": ["", "even", "prefix"],
    "probe": ["probe", "superb", "none"],
}
LEAST = {  # of options that are integers
    **dict.fromkeys(["num_nodes", "num_threads", "nj", "inference_nj", "nbpe"], 1),
    **dict.fromkeys(["n_mels", "calibration_utts", "top_k", "stats_utts"], 1),
    **dict.fromkeys(["rtf_utts", "seed", "ngpu"], 0),
}
FILES = ["parallel_config", "bpe_train_text", "nlsyms_txt", "pretrained_model"]
FILES += ["asr_config", "reference_config", "sfm_config", "inference_config", "lm_file"]
DIRECTORIES = ["dumpdir", "expdir", "asr_exp", "asr_stats_dir", "lm_exp"]
TAGS = ["asr_tag", "reference_tag", "sfm_tag"]
DIRECTORIES += [*TAGS, "inference_tag"]  # parts of such
ARGUMENTS = ["launch_args", "local_data_opts", "reference_args", "asr_args"]
ARGUMENTS += ["inference_args", "sfm_args", "probe_args", "superb_args"]


def check_common(options: Mapping[str, str]) -> dict[str, str]:
    """Check what the recipes have in common; return options in their plain form."""
    for name, choices in CHOICES.items():
        if options.get(name, choices[0]) not in choices:
            allowed = ", ".join(choice for choice in choices if choice)
            raise UserError(f"--{name} {options[name]}: choose one of {allowed}")
    for name in ("stage", "stop_stage"):
        check_integer(name, options[name], 1, 15)
    if int(options["stage"]) > int(options["stop_stage"]):
        raise UserError(
            f"--stage {options['stage']} comes after --stop_stage "
            f"{options['stop_stage']}: nothing would run"
        )
    skipped = options["skip_stages"].replace(",", " ").split()
    for stage in skipped:
        check_integer("skip_stages", stage, 1, 15)
    for name, least in LEAST.items():
        if name in options and options[name] != UNSET.get(name):
            check_integer(name, options[name], least)
    if "frame_shift" in options:
        shift = number("frame_shift", options["frame_shift"], 0.0)
        if options["feats_type"] == "fbank" and shift != 0.01:
            raise UserError(
                f"--frame_shift {options['frame_shift']}: --feats_type fbank makes a "
                "frame every 0.01 s; leave it out, or bring your own features with "
                "--feats_type extracted"
            )
    longest = number("max_wav_duration", options["max_wav_duration"], 0.0)
    if number("min_wav_duration", options["min_wav_duration"], -1e-9) >= longest:
        raise UserError(
            f"--min_wav_duration {options['min_wav_duration']} is not below "
            f"--max_wav_duration {options['max_wav_duration']}: no utterance would be "
            "left"
        )
    for name in FILES:
        check_file(name, options.get(name, ""))
    for name in DIRECTORIES:
        check_directory(name, options.get(name, ""))
    for name in (*TAGS, "asr_exp"):
        text = options.get(name, "")
        if re.search("[/=]", Path(text).name if name == "asr_exp" else text):
            raise UserError(
                f"--{name} {text}: it names the system in tables, so choose one "
                "without slashes and ="
            )
    for name in ARGUMENTS:
        words_of(options, name)
    _check_sets(options)
    if options["hf_repo"] and not re.fullmatch(r"[\w.-]+/[\w.-]+", options["hf_repo"]):
        raise UserError(f"--hf_repo {options['hf_repo']}: write user/name")
    _check_launch(options)
    rate = parsed(sampling_rate, options, "fs")
    return {"fs": str(rate), "skip_stages": " ".join(skipped)}


def _check_launch(options: Mapping[str, str]) -> None:
    """Refuse a launch that does not know where to."""
    if options["launch_args"].split()[:1] == ["srun"]:
        _check_srun(options)
        return
    launch = dict(by_name(words_of(options, "launch_args")))
    if not options["launch_args"].split() and int(options["num_nodes"]) == 1:
        return
    if not {"cmd", "host"} & set(launch):
        raise UserError(
            f"--num_nodes {options['num_nodes']} --launch_args "
            f"'{options['launch_args']}': say where to train, such as --launch_args "
            '"srun --nodes 2" (and --num_nodes 1), or "--host node1,node2"'
        )
    if script := " ".join(launch.get("cmd", [])).split():
        if not shutil.which(script[0]):
            raise UserError(
                f"--launch_args {options['launch_args']}: there is no {script[0]}; "
                "name the path of such a script of Kaldi's, or train through Slurm "
                'with --launch_args "srun --ntasks 2"'
            )


def _check_srun(options: Mapping[str, str]) -> None:
    given = f"--launch_args '{options['launch_args']}'"
    for name, of_srun in (("num_nodes", "--nodes"), ("ngpu", "--ntasks-per-node")):
        if options[name] not in ("auto", "0", "1"):
            raise UserError(
                f"{given}: say {of_srun} {options[name]} to srun, and --{name} 1 here; "
                "each of its tasks trains on one GPU"
            )
    if not shutil.which("srun"):
        raise UserError(f"{given}: there is no srun here; start it where Slurm is")


def _check_sets(options: Mapping[str, str]) -> None:
    for name in ("train_set", "valid_set"):
        if not re.fullmatch(r"[^\s/,]+", options[name]):
            raise UserError(f'--{name} "{options[name]}": name a directory of data/')
    if options["train_set"] == options["valid_set"]:
        raise UserError(
            f"--train_set and --valid_set are both {options['train_set']}: the best "
            "model is chosen on the validation set, so name another one"
        )
