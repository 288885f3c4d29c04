"""Directories of Hugging Face transformers, and names on its Hub."""

import transformers

from dldkit.errors import UserError
from dldkit.sfm.teacher.protocol import PathLike


def read_config(path: PathLike) -> transformers.PretrainedConfig:
    """Read config.json.

    Raises:
        UserError: when there is no such model.
    """
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no teacher {path}: name a Hugging Face model or its directory, an ESPnet "
            f"SSL experiment, or cached targets ({error})"
        ) from error
