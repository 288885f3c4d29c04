"""Runs of a comparison."""

from dldkit.report.runs import Run

MACS = {str(depth): 40 + 10 * depth for depth in range(1, 13)}


def run_of(system, seed=1, epochs=8, depth=12.0, errors=None, reference=None, **others):
    """A run on one test set of four utterances with ten words each."""
    return Run(
        system=system,
        seed=seed,
        epochs=epochs,
        steps=100 * epochs,
        depth=depth,
        macs=MACS,
        words={"test": [10] * 4},
        errors={"test": errors or {"12": [1, 1, 1, 1]}},
        conf={"encoder_conf": {}, "model_conf": {"reference": reference}},
        environment={},
        **others,
    )
