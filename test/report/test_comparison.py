"""Comparisons of systems: bootstrap and tables."""

import math
import re

import numpy as np
import pytest
from compared import run_of

from dldkit.errors import UserError
from dldkit.report.comparison import Comparison, difference, tables


class TestDifference:
    def test_is_that_of_the_error_rates(self):
        ours = [run_of("a", seed=s, errors={"12": [0, 1, 0, s]}) for s in (1, 2)]
        theirs = [run_of("b", seed=s, errors={"6": [2, 2, 2, 2]}) for s in (2, 1)]
        found, low, high = difference(ours, theirs, "test", 12, 6)
        assert found == pytest.approx(100 * (2.5 - 8) / 40)
        assert low < found < high < 0

    def test_interval_is_the_normal_one_for_many_utterances(self):
        rng = np.random.default_rng(3)
        errors = rng.poisson(1.0, (2, 800))
        ours, theirs = (
            [run_of("a", errors={"12": row.tolist()})] for row in errors.astype(int)
        )
        for run in (*ours, *theirs):
            run.words = {"test": [5] * 800}
        found, low, high = difference(ours, theirs, "test", 12, 12)
        error = (errors[0] - errors[1]).std() / math.sqrt(800) / 5 * 100
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
        assert (high + low) / 2 == pytest.approx(found, abs=0.1 * error)

    def test_is_paired(self):
        """Equal errors differ by nothing, however much utterances and seeds differ."""
        ours = [run_of("a", seed=s, errors={"12": [0, 9, 3, s]}) for s in (1, 7)]
        assert difference(ours, ours, "test", 12, 12) == (0.0, 0.0, 0.0)

    def test_needs_common_seeds(self):
        with pytest.raises(UserError, match="a and b have no seed in common"):
            difference([run_of("a", 1)], [run_of("b", 2)], "test", 12, 12)


class TestTables:
    def runs(self):
        return [
            run_of("static12", errors={"12": [1, 2, 1, 2]}),
            run_of("static6", errors={"6": [1, 1, 1, 1]}),
            run_of("static6", epochs=13, errors={"6": [0, 0, 0, 0]}),
            run_of(
                "dld",
                depth=6.5,
                errors={"12": [3, 3, 3, 3], "6": [2, 1, 1, 1]},
                reference="asr_static12/posteriors",
            ),
            run_of("exits", reference="self"),
            run_of(
                "ours",
                depth=6.5,
                errors={"12": [0, 0, 0, 0], "6": [1, 1, 1, 2], "2": [3, 3, 3, 3]},
            ),
        ]

    def test_compare_equal_epochs_with_each_other(self):
        systems = ["static12", "static6", "dld", "exits", "ours"]
        budgets = {"steps": dict.fromkeys(systems, 8)}
        text = tables(self.runs(), systems, budgets, 8)
        rows = {
            (cells[1], len(cells) - 2): cells[2:-1]
            for cells in ([c.strip() for c in r.split("|")] for r in text.splitlines())
            if len(cells) > 3
        }
        assert rows["static6", 7] == ["1", "8", "800", "6.0", "0.62", "0.62"]
        assert rows["dld", 7] == ["1", "8", "800", "6.5", "0.66", "1.66"]
        assert rows["exits", 7] == ["1", "8", "800", "12.0", "1.00", "1.00"]
        assert rows["static, one model per depth", 4] == ["15.00", "10.00", ""]
        assert rows["ours", 4] == ["0.00", "12.50", "30.00"]
        # at depth 12, who has static6 would not ship static12
        assert rows["static", 4][0] == "-10.00 [-10.00, -10.00], one seed (static6)"
        assert rows["static", 4][1].startswith("+2.50 [+0.00,")
        assert rows["static", 4][2] == ""  # there is no static model of 2 layers
        assert rows["dld", 4][0] == "-30.00 [-30.00, -30.00], one seed"
        assert rows["dld", 4][1].startswith("+0.00 [")

    def test_are_bold_where_several_seeds_leave_out_zero(self):
        worse = [run_of("dld", seed, errors={"12": [3, 3, 3, 3]}) for seed in (1, 2)]
        level = [run_of("dld", seed, errors={"12": [0, 2, 0, 2]}) for seed in (1, 2)]
        ours = [run_of("ours", seed, errors={"12": [1, 1, 1, 1]}) for seed in (1, 2)]
        for theirs, cell in ((worse, r"\*\*-20.00 \["), (level, r"\+0.00 \[")):
            runs = {"dld": theirs, "ours": ours}
            text = Comparison(runs, run_of("static12"), 8).differences("ours", "test")
            assert re.search(rf"dld +\| +{cell}", text), text

    def test_leave_out_models_that_lack_a_seed(self):
        """The best of models with one seed each would be best by chance."""
        both = [run_of(s, seed) for s in ("static12", "ours") for seed in (1, 2)]
        lucky = run_of("static6", errors={"6": [0, 0, 0, 0]})
        systems = ["static12", "static6", "ours"]
        budgets = {"steps": dict.fromkeys(systems, 8)}
        text = tables([*both, lucky], systems, budgets, 8)
        assert "(static6)" not in text
        again = run_of("static6", 2, errors={"6": [0, 0, 0, 0]})
        assert "(static6)" in tables([*both, lucky, again], systems, budgets, 8)

    def test_leave_out_depths_that_a_system_is_not_trained_at(self):
        """An exit after every fourth layer: its depth 6 is of no use to anybody."""
        errors = {depth: [1, 1, 1, 1] for depth in ("12", "8", "6")}
        runs = [run_of(name, errors=errors) for name in ("static12", "a", "ours")]
        exits = dict(layer_choice="prefix", exits=4)
        runs[1].conf["encoder_conf"] = dict(depth_sampler="full", **exits)
        runs[2].conf["encoder_conf"] = dict(depth_sampler="uniform", **exits)
        names = ["static12", "a", "ours"]
        text = tables(runs, names, {"steps": dict.fromkeys(names, 8)}, 8)
        found = {
            row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
            for row in text.splitlines()
            if re.match(r"\| (a|ours) .*10.00", row)
        }
        assert found == {"a": ["10.00", "10.00", ""], "ours": ["10.00"] * 3}
        (difference,) = re.findall(r"\| a +\| \+0.00.*", text)
        assert [bool(c.strip()) for c in difference.split("|")[2:-1]] == [1, 1, 0]

    def test_say_which_systems_have_no_seed_in_common(self):
        runs = [run_of("static12"), run_of("static12", seed=2)]
        runs += [run_of("other"), run_of("mine", seed=2)]
        names = ["static12", "other", "mine"]
        text = tables(runs, names, {"steps": dict.fromkeys(names, 8)}, 8)
        rows = re.findall(r"\| other +\| +(\S.*?) +\|", text)
        assert rows[-1] == "no common seed"

    def test_take_the_epochs_of_the_budget(self):
        budgets = {"arithmetic": {"static12": 8, "static6": 13}}
        text = tables(self.runs(), ["static12", "static6"], budgets, 8)
        assert "15.00" in text and "0.00" in text and "10.00" not in text

    def test_refuse_seeds_of_a_system_that_was_changed_in_between(self):
        runs = [run_of("static12", seed=seed) for seed in (1, 2)]
        drawn = ("exits", {str(depth): 1 for depth in (4, 8, 12)})
        mine = [run_of("mine", seed=seed) for seed in (1, 2)]
        for run, other, reference in zip(mine, drawn, ("exp/a", "exp/b")):
            of = dict(depth_sampler=other, layer_choice="prefix", exits=4)
            run.conf = dict(encoder_conf=of, model_conf={"reference": reference})
        epochs = {"steps": {"static12": 8, "mine": 8}}
        # the same draws, written in another way, and the reference of another seed
        assert "| mine" in tables([*runs, *mine], ["static12", "mine"], epochs, 8)

        mine[1].conf["encoder_conf"]["depth_sampler"] = "uniform"
        with pytest.raises(UserError, match="mine, 8 epochs: seeds 1 and 2 were train"):
            tables([*runs, *mine], ["static12", "mine"], epochs, 8)

    def test_refuse_runs_on_other_test_data(self):
        epochs = {"steps": {"static12": 8, "mine": 8}}
        runs = [run_of(s, seed) for s in ("static12", "mine") for seed in (1, 2)]
        for words in ({"test": [10] * 3}, {"test": [9] * 4}, {"other": [10] * 4}):
            runs[3].words = words
            message = "mine, 8 epochs, seed 2: it was decoded on another (test|other)"
            with pytest.raises(UserError, match=message):
                tables(runs, ["static12", "mine"], epochs, 8)
        runs[3] = run_of("mine", 2, errors={depth: [1] * 4 for depth in ("12", "6")})
        with pytest.raises(UserError, match="seed 2: test .* depth 6 12, with seed 1"):
            tables(runs, ["static12", "mine"], epochs, 8)

    def test_a_budget_may_lack_the_deepest_model(self):
        """Its cost is known from the shorter run."""
        names = ["static12", "mine"]
        runs = [run_of("static12"), run_of("mine", epochs=16)]
        text = tables(runs, names, {"total": dict.fromkeys(names, 16)}, 8)
        (row,) = (line for line in text.splitlines() if "1600" in line)
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[1:-1] == ["mine", "1", "16", "1600", "12.0", "2.00", "2.00"]

    def test_longer_and_shorter_runs_leave_the_unit_as_it_is(self):
        """It is --epochs of the deepest model, as a reference has them."""
        names = ["static12", "mine"]
        mine = run_of("mine", reference="exp/asr_static12_e8")
        for epochs in (4, 16):
            runs = [run_of("static12", epochs=epochs), mine]
            text = tables(runs, names, {"total": {"static12": 16, "mine": 8}}, 8)
            row = next(line for line in text.splitlines() if "| mine" in line)
            assert [c.strip() for c in row.split("|")][-3:-1] == ["1.00", "2.00"]

    def test_need_the_deepest_model(self):
        with pytest.raises(UserError, match="no run of static10 yet"):
            tables(self.runs(), ["static10"], {"steps": {"static10": 8}}, 8)
