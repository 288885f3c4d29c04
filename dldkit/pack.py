"""One zip of a trained model, which loads where nobody ever saw the experiment."""

import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import yaml
from espnet2 import __version__ as espnet_version
from espnet2.main_funcs.pack_funcs import unpack
from torch import __version__ as torch_version

import dldkit
from dldkit.config_files import BARE_NAMES, named_files, resolved_config, set_file
from dldkit.depth.profile import profile_path
from dldkit.errors import UserError
from dldkit.step import Step, digest

PathLike = str | Path

BESIDE = ("train.yaml", "RESULTS.md", "wer_vs_depth.png", "images", "probe.json")

_RECOGNISE = """
import json, sys
import numpy
from dldkit.asr.inference import Speech2Text
recognise = Speech2Text.from_pretrained(sys.argv[1])
text, *_, hypothesis = recognise(numpy.load(sys.argv[2]))[0]
print(json.dumps([text, float(hypothesis.score)]))
"""


def pack_asr(model_file: PathLike, outpath: PathLike, data_dir: PathLike) -> None:
    """Pack a speech recogniser.

    Args:
        model_file: checkpoint, beside its config.yaml.
        outpath: the zip, in a directory for it alone.
        data_dir: formatted speech. Its first utterance is decoded with the zip, by
            another process, and has to give the same text as before.

    Raises:
        UserError: a file is missing, or the zip does not load or recognises otherwise.
    """

    def check(archive: Path, work: Path) -> None:
        import numpy as np

        from dldkit.asr.inference import Speech2Text
        from dldkit.asr.loading import without_espnets_news
        from dldkit.asr.speech import SpeechReader, utterance_ids

        with without_espnets_news():
            config = Path(model_file).with_name("config.yaml")
            recognise = Speech2Text(config, model_file)
        utt_id = utterance_ids(data_dir)[0]
        speech = SpeechReader(data_dir, recognise.asr_train_args)(utt_id)
        np.save(work / "speech.npy", speech)
        text, *_, hypothesis = recognise(speech)[0]
        said = _elsewhere(["-c", _RECOGNISE, archive, work / "speech.npy"], work)
        text_there, score_there = json.loads(said.splitlines()[-1])
        score = float(hypothesis.score)
        if text != text_there or not math.isclose(score, score_there, rel_tol=1e-3):
            raise UserError(
                f"{outpath} was not made: from the zip, utterance {utt_id} is "
                f'"{text_there}" ({score_there:.3f}) instead of "{text}" ({score:.3f})'
            )

    _pack("asr", Path(model_file), Path(outpath), BESIDE, check)


def pack_ssl(
    model_file: PathLike, outpath: PathLike, exports: Sequence[str] = ()
) -> None:
    """Pack a distilled student.

    Args:
        model_file: checkpoint, beside its config.yaml.
        outpath: the zip, in a directory for it alone.
        exports: directories beside the checkpoint; the first holds all layers. An
            export from the zip, by another process, has to equal it.

    Raises:
        UserError: a file is missing, or the zip does not load or exports otherwise.
    """

    def check(archive: Path, work: Path) -> None:
        there = unpack(archive, work / "unpacked")
        command = ["-m", "dldkit.bin.sfm_export", "--output_dir", work / "hf"]
        command += ["--config", there["ssl_train_config"]]
        _elsewhere([*command, "--model_file", there["ssl_model_file"]], work)
        name = "model.safetensors"
        before = Path(model_file).with_name(exports[0]) / name
        if digest(work / "hf" / name) != digest(before):
            raise UserError(
                f"{outpath} was not made: {before} is not what the checkpoint in the "
                "zip exports; run stage 12 again"
            )

    beside = [*BESIDE, *exports]
    _pack("ssl", Path(model_file), Path(outpath), beside, check if exports else None)


def _pack(
    kind: str,
    model_file: Path,
    outpath: Path,
    beside: Sequence[str],
    check: Callable[[Path, Path], None] | None,
) -> None:
    exp = model_file.parent
    config_file = exp / "config.yaml"
    for needed in (model_file, config_file):
        if not needed.is_file():
            raise UserError(f"{needed} does not exist: train the model first")
    with resolved_config(config_file) as resolved:
        config = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    files = {model_file.name: model_file}
    for key, path in named_files(config).items():
        # ./NAME is what ESPnet's unpack, its downloader and we find beside the config
        set_file(config, key, f"./{BARE_NAMES[key]}")
        files[BARE_NAMES[key]] = Path(path)
    if kind == "asr":
        from dldkit.asr.loading import profile_of

        if profile := profile_of(model_file):
            name = profile_path(model_file.name).name  # in the zip, links are files
            files[name] = profile
    for top in (exp / name for name in beside):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            name = path.relative_to(exp)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                files[str(name)] = path
    meta = {
        "files": {f"{kind}_model_file": model_file.name},
        "yaml_files": {f"{kind}_train_config": config_file.name},
        "timestamp": datetime.now().timestamp(),
        "python": sys.version,
        "torch": str(torch_version),
        "espnet": espnet_version,
        "dldkit": dldkit.__version__,
        "install": f"pip install /path/to/dldkit, {dldkit.__version__}",
    }
    inputs = {**files, config_file.name: config_file}
    with Step(outpath.parent, inputs, name=outpath.name, meta=meta["install"]) as step:
        if step.done:
            return
        with (
            tempfile.TemporaryDirectory(dir=outpath.parent) as beside_it,
            tempfile.TemporaryDirectory() as work,
        ):
            archive = Path(beside_it).resolve() / outpath.name
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zip_file:
                zip_file.writestr("meta.yaml", yaml.safe_dump(meta))
                zip_file.writestr(config_file.name, yaml.safe_dump(config))
                for name, path in files.items():
                    zip_file.write(path, name)
            if check:
                check(archive, Path(work))
            archive.replace(outpath)


def _elsewhere(arguments: Sequence[PathLike], work: Path) -> str:
    """Run this Python in an empty directory, as a stranger; return what it printed.

    Raises:
        UserError: it failed.
    """
    empty = work / "empty"
    empty.mkdir()
    roots = [str(Path(dldkit.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "HOME": str(empty),  # and with it the caches
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
    }
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        last = [*process.stderr.splitlines(), "no message"][-2:][0]
        raise UserError(f"the packed model can not be used elsewhere: {last}")
    return process.stdout
