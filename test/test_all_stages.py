"""Every recipe from its corpus, in the real layout, to the depth report."""

import re
from functools import partial

import pytest
import soundfile
from layouts import CORPORA, an4
from running import ROOT, copy_of_the_recipes, environment, shell

from dldkit.data.datadir import read_table, utterances

LAYOUTS = {**CORPORA, "an4": partial(an4, dev=100)}
MADE = ("digits", "espeak_words")  # these make their sentences
FEW = "--num_train 12 --num_dev 4 --num_test_seen 4 --num_test_unseen 4"
SIZES = "num_blocks=4 output_size=8 linear_units=8 attention_heads=2".split()
TINY = "--max_epoch 2 --batch_type sorted --batch_size 3 --num_workers 0 "
TINY += "--accum_grad 1 " + " ".join(f"--encoder_conf {size}" for size in SIZES)


def test_no_recipe_is_left_out():
    recipes = {path.parents[1].name for path in ROOT.glob("egs2/*/asr1/run.sh")}
    assert recipes == {*LAYOUTS, *MADE, "mini_an4"}  # the last: see test_asr_recipe.py


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *MADE])
def test_stages_1_to_13(name, tmp_path):
    """Two epochs of a tiny reference and of a tiny `anytime`, which has all stages."""
    recipes, env = copy_of_the_recipes(tmp_path), environment()
    recipe = recipes / name / "asr1"
    words = ["--asr_args", TINY, "--reference_args", TINY, "--asr_tag", "tiny"]
    words += ["--system", "anytime"]
    words += ["--inference_depths", "4 2", "--rtf_utts", 2, "--nj", 1]
    if name in MADE:
        words += ["--local_data_opts", FEW]
    else:
        mini = recipes / "mini_an4" / "asr1"
        shell("local/data.sh", cwd=mini)
        wavs = read_table(mini / "data" / "train_nodev" / "wav.scp").values()
        speech = [soundfile.read(mini / wav, dtype="int16")[0] for wav in wavs][:3]
        layout = LAYOUTS[name](tmp_path / "my córpus", speech)
        env[layout.variable] = str(layout.home)
    if name == "commonvoice":
        words += ["--lang", "cy"]
    if re.search("--token_type .*(bpe|token_type)", (recipe / "run.sh").read_text()):
        words += ["--token_type", "char"]  # three sentences are too few for 256 units
    text = shell("./run.sh", *words, "--stop_stage", 13, cwd=recipe, env=env)
    for stage in range(1, 14):
        assert f"Stage {stage}: " in text
    assert "2epoch results: [train] " in text
    tests = re.search('--test_sets "(.*)"', (recipe / "run.sh").read_text())[1]
    if name == "commonvoice":
        tests = "dev_cy test_cy"
    for test_set in tests.split():
        wanted = utterances(recipe / "dump" / "raw" / test_set)
        for depth in (4, 2):
            (decoded,) = recipe.glob(f"exp/asr_tiny/decode*/depth{depth}/{test_set}")
            lines = (decoded / "text").read_text().splitlines()
            # what it recognises may be nothing
            assert [line.split(" ")[0] for line in lines] == list(wanted)
    assert "| tiny " in (recipe / "exp/asr_tiny/RESULTS.md").read_text()
