"""Distillation of speech foundation models (arXiv 2606.11766)."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError(
        "distillation of foundation models needs transformers: pip install "
        "'dldkit[sfm]', or run tools/install.sh"
    )

from dldkit import patches

patches.prepare_espnet()
