"""Configs: how they are merged, and the files that they name, kept beside them.

ESPnet's config names them relative to the directory where training was started, and
resolves them against the one where inference is. Here, an experiment directory has
copies under bare names, which are looked up beside config.yaml. ESPnet's `unpack`
rewrites bare names to where they are, so that a packed zip works without dldkit's help.
"""

import argparse
import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dldkit.errors import UserError
from dldkit.step import atomic

PathLike = Union[str, Path]

BARE_NAMES = {
    "normalize_conf.stats_file": "feats_stats.npz",
    "bpemodel": "bpe.model",
    "token_list": "tokens.txt",
    "non_linguistic_symbols": "nlsyms.txt",
}


def merge_files(configs: Sequence[str]) -> DictConfig:
    """Merge YAML files and key=value settings, nested dictionaries key by key.

    Raises:
        UserError: a file is missing or no YAML dictionary.
    """
    merged = OmegaConf.create()
    for config in configs:
        try:
            if Path(config).is_file():
                part = OmegaConf.load(config)
            elif "=" in config:
                part = OmegaConf.from_dotlist([config])
            else:
                raise UserError(f"the config {config} does not exist")
            merged = OmegaConf.merge(merged, part)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
            raise UserError(f"{config} can not be merged: {error}") from error
    return merged


def merge_configs(configs: Sequence[str]) -> DictConfig:
    """Merge as `merge_files` does.

    Raises:
        UserError: as well where a value that a file marks with ??? was not given.
    """
    merged = merge_files(configs)
    missing = OmegaConf.missing_keys(merged)
    if missing:
        raise UserError(
            f"{' '.join(configs)}: give {'=..., '.join(sorted(missing))}=..."
        )
    return merged


def named_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the files that a config names, by their key in it."""
    found = {}
    for key in BARE_NAMES:
        section, _, name = key.rpartition(".")
        value = (config.get(section) or {} if section else config).get(name)
        if value is not None and isinstance(value, (str, Path)):
            found[key] = str(value)
    return found


def without_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the paths of its files, which enter by their content."""
    plain = copy.deepcopy(dict(config))
    for key in named_files(plain):
        section, _, name = key.rpartition(".")
        del (plain[section] if section else plain)[name]
    return plain


def set_file(config: dict[str, Any], key: str, value: str) -> None:
    """Let a config name another file, by a key of `named_files`."""
    section, _, name = key.rpartition(".")
    if section:
        config[section] = {**config[section], name: value}
    else:
        config[name] = value


def copy_files(args: argparse.Namespace) -> None:
    """Copy the files that `args` name into `args.output_dir`, and name the copies.

    A copy that is there already serves where the original is gone.
    """
    for key, path in named_files(vars(args)).items():
        own = Path(args.output_dir, BARE_NAMES[key])
        if Path(path).is_file() or not own.is_file():
            with atomic(own) as part:
                shutil.copyfile(path, part)
        set_file(vars(args), key, own.name)


def resolve(config: Mapping[str, Any], directory: PathLike) -> dict[str, Any]:
    """Return the config with its files found: in `directory` first if bare names.

    Raises:
        UserError: naming a file that is not there.
    """
    directory, resolved = Path(directory), dict(config)
    for key, path in named_files(config).items():
        beside = directory / Path(path).name
        bare = Path(path) == Path(Path(path).name)  # also ./NAME, as in a packed zip
        if beside.is_file() and (bare or not Path(path).is_file()):
            set_file(resolved, key, str(beside))
        elif not Path(path).is_file():
            # ESPnet's are relative to the recipe, which is above the experiment
            above = (p / path for p in directory.resolve().parents)
            if found := next((file for file in above if file.is_file()), None):
                set_file(resolved, key, str(found))
                continue
            raise UserError(
                f"the config in {directory} names {path} as its {key}: there is no "
                f"such file beside it, nor {Path(path).absolute()}. Copy it there"
            )
    return resolved


@contextmanager
def resolved_arguments(args: argparse.Namespace) -> Iterator[None]:
    """Let `args` name its files as they can be opened, while the context lasts."""
    before = dict(vars(args))
    found = resolve(before, args.output_dir or ".")
    vars(args).update(found)
    try:
        yield
    finally:
        for key, path in named_files(vars(args)).items():
            if named_files(found).get(key) == path:  # a list of tokens replaces a file
                set_file(vars(args), key, named_files(before)[key])


@contextmanager
def resolved_config(path: PathLike) -> Iterator[Path]:
    """Yield a config file that names the files of the one at `path` with full paths.

    Raises:
        UserError: it can not be read, is no config, or names a file that is not there.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            config = yaml.load(file, yaml.CSafeLoader)
    except OSError as error:
        raise UserError(f"{path} can not be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise UserError(f"{path} is no YAML file: {where}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no config of ESPnet: it holds no keys and values")
    resolved = resolve(config, path.parent)
    if resolved == config:
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / path.name
        with found.open("w", encoding="utf-8") as file:
            yaml.dump(resolved, file, yaml.CSafeDumper, allow_unicode=True)
        yield found
