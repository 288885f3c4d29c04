"""The command that records runs of a comparison, and makes its tables."""

import json
from pathlib import Path

import pytest
import yaml

from dldkit.bin import compare
from dldkit.errors import UserError
from dldkit.report.runs import load_runs, record


def config(**encoder):
    return {"encoder_conf": {"num_blocks": 12, **encoder}}


class TestCommand:
    @pytest.fixture
    def exp(self, student, corpus, tmp_path):
        """A trained model with results as decoding leaves them."""
        exp = tmp_path / "exp"
        exp.mkdir()
        for file in student.iterdir():
            (exp / file.name).symlink_to(file)
        for depth, text in ((4, "x two nine"), (2, "x two two two")):
            directory = exp / "compared" / f"depth{depth}" / "dev"
            directory.mkdir(parents=True)
            others = "y eight three zero\nz four one\n"
            (directory / "text").write_text(f"{text}\n{others}")
        return exp

    @pytest.fixture
    def recorded(self, exp, corpus, tmp_path):
        file = tmp_path / "results" / "dld_e3_seed7.json"
        compare.main(
            f"record --exp {exp} --inference_tag compared --name static4 --seed 7 "
            f"--data_root {corpus.dev.parent} --output {file}".split()
        )
        return file

    def test_records_a_run(self, recorded, exp):
        (run,) = load_runs(recorded.parent)
        assert (run.system, run.seed, run.epochs) == ("static4", 7, 3)
        assert not Path(run.conf["model_conf"]["reference"]).is_absolute()
        assert run.steps == 9  # nine utterances, three at a time
        assert 1 <= run.depth <= 4
        assert run.words == {"dev": [2, 3, 2]}
        assert run.errors == {"dev": {"2": [2, 0, 0], "4": [0, 0, 0]}}
        assert run.error_rate("dev", 2) == pytest.approx(100 * 2 / 7)
        costs = [run.macs[str(depth)] for depth in (1, 2, 3, 4)]
        assert costs[1] - costs[0] == pytest.approx(costs[3] - costs[2], rel=1e-6)
        assert costs[0] < costs[1]

    def test_writes_tables(self, recorded, tmp_path):
        tables = tmp_path / "README.md"
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config()))
        compare.main(
            f"table --results {recorded.parent} --epochs 3 --configs {tmp_path}/c.yaml "
            f"--budgets steps --systems static4 --output {tables} "
            "--command local/compare.sh".split()
        )
        text = tables.read_text()
        assert "Made by `local/compare.sh` on" in text and "torch" in text
        assert "|static, one model per depth|" in text.replace(" | ", "|").replace(
            "| ", "|"
        )

    @pytest.mark.parametrize("what", ["table --output x --command x", "epochs"])
    def test_refuses_runs_of_another_training(self, recorded, tmp_path, what, capsys):
        """Of another learning rate, which the names of their files do not tell."""
        other = {**config(), "optim": "adam", "optim_conf": {"lr": 0.5}}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(other))
        command = f"{what} --results {recorded.parent} --epochs 3 --budgets steps "
        command += f"--configs {tmp_path}/c.yaml --systems static4"
        if what == "epochs":
            command += " --deepest static4"
        with pytest.raises(SystemExit):
            compare.main(command.split())
        wanted = "static4, 3 epochs, seed 7: it was trained with optim"
        assert wanted in capsys.readouterr().err

    def test_tells_epochs_of_equal_cost(self, recorded, tmp_path, capsys):
        macs = {str(depth): 40 + 10 * depth for depth in range(1, 5)}
        run = {**json.loads(recorded.read_text()), "macs": macs}
        recorded.write_text(json.dumps(run))
        systems = tmp_path / "systems"
        systems.mkdir()
        (systems / "mine.yaml").write_text("encoder_conf: {depth_sampler: uniform}")
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config(num_blocks=4)))
        command = (
            f"epochs --results {recorded.parent} --epochs 10 --deepest static4 "
            f"--configs {tmp_path}/c.yaml {systems} --systems".split()
        )
        command += ["mine static4 static1", "--budgets"]
        compare.main([*command, "steps arithmetic"])
        equal = "mine 10\nstatic4 10\nstatic1 10\n"
        cheaper = "mine 12\nstatic4 10\nstatic1 16\n"
        assert capsys.readouterr().out == equal + cheaper
        with pytest.raises(SystemExit):
            compare.main([*command, "steps time"])
        assert "'steps time': write some of steps arithmetic" in capsys.readouterr().err

    def test_may_count_the_training_of_the_reference(self, recorded, tmp_path, capsys):
        """Those that have none get the epochs of two static models in all."""
        macs = {str(depth): 40 + 10 * depth for depth in range(1, 13)}
        run = {**json.loads(recorded.read_text()), "macs": macs}
        recorded.write_text(json.dumps({**run, "system": "static12"}))
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config()))
        systems = Path(__file__).parents[2] / "conf" / "systems"
        command = (
            f"epochs --results {recorded.parent} --epochs 10 --budgets total "
            f"--deepest static12 --configs {tmp_path}/c.yaml {systems} --systems"
        )
        compare.main([*command.split(), "static12 early_exit static2 anytime"])
        expected = "static12 20\nearly_exit 20\nstatic2 53\nanytime 15\n"
        assert capsys.readouterr().out == expected

    @pytest.mark.parametrize(
        "system, reference",
        [
            ("anytime", "early_exit"),
            ("nested", "static12"),
            ("early_exit", ""),
            ("rd", ""),
            ("static2", ""),
        ],
    )
    def test_tells_the_reference(self, tmp_path, capsys, system, reference):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config()))
        systems = Path(__file__).parents[2] / "conf" / "systems"
        compare.main(
            f"reference --deepest static12 --configs {tmp_path}/c.yaml {systems} "
            f"{tmp_path} --systems".split() + [f"static12 {system}"]
        )
        assert capsys.readouterr().out == f"\n{reference}\n"

    def test_refuses_a_system_that_there_is_not(self, tmp_path, capsys):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config()))
        command = "reference --systems nosuch --deepest static12 --configs"
        with pytest.raises(SystemExit):
            compare.main([*command.split(), str(tmp_path / "c.yaml"), str(tmp_path)])
        assert "nosuch: there is no nosuch.yaml in" in capsys.readouterr().err

    def test_refuses_what_is_no_run(self, recorded, tmp_path):
        (recorded.parent / "x.json").write_text("{}")
        with pytest.raises(UserError, match=r"x\.json is no run .*: remove it"):
            load_runs(recorded.parent)

    def test_refuses_what_is_not_decoded(self, static, corpus):
        with pytest.raises(UserError, match="no decoded text: run stage 12"):
            record(static, "none", "static4", 0, corpus.dev.parent)
