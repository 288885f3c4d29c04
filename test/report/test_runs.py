"""What trainings cost that are compared."""

import pytest
from compared import run_of

from dldkit.errors import UserError
from dldkit.report.runs import epochs_of_equal_cost, mean_depth


class TestCost:
    @pytest.mark.parametrize(
        "encoder, model, expected",
        [
            (dict(depth_sampler="full"), {}, 12),
            (dict(depth_sampler="full"), dict(reference="self"), 12),
            (dict(depth_sampler="uniform"), {}, 6.5),
            (dict(depth_sampler="uniform", min_depth=3), {}, 7.5),
            (dict(depth_sampler="exits", exits=2), {}, 7.0),
            # Bernoulli gates without the draw of no layer at all
            ({}, {}, 6 / (1 - 0.5**12)),
            (dict(depth_sampler={12: 1, 2: 3}), {}, 4.5),
            # full, smallest and one drawn depth; nested ones are on the way
            (dict(depth_sampler="uniform"), dict(reference="self"), 12 + 1 + 6.5),
            (
                dict(depth_sampler="uniform", layer_choice="prefix"),
                dict(sandwich=2),
                12,
            ),
        ],
    )
    def test_of_a_step_is_the_mean_depth_of_its_forwards(
        self, encoder, model, expected
    ):
        found = mean_depth(
            dict(encoder_conf={"num_blocks": 12, **encoder}, model_conf=model)
        )
        assert found == pytest.approx(expected)

    def test_that_is_equal_takes_more_epochs_of_smaller_models(self):
        runs = [run_of("static12")]
        # 160 against 100 and 60 MACs
        assert epochs_of_equal_cost(runs, "static12", 10, 6) == 16
        assert epochs_of_equal_cost(runs, "static12", 9, 2) == 24
        with pytest.raises(UserError, match="no run of static8 yet: run stage 2"):
            epochs_of_equal_cost(runs, "static8", 10, 6)
