"""Recipes of distillation: their configs, and digits/ssl1 from start to end."""

import json
import os
import re
import shutil
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from pretrained import TINY_STUDENT, write_teacher
from running import ROOT, copy_of_the_recipes, environment, shell, snippet_of

RECIPES = sorted(path.parents[1] for path in ROOT.glob("egs2/*/ssl1/conf"))
SYSTEMS = sorted((ROOT / "conf" / "systems_ssl").glob("*.yaml"))
SMALL = "--num_valid 2 --num_strings 10 --num_valid_strings 2 --num_probe_train 12"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda path: path.stem)
def test_every_distillation_config_builds_its_student(
    recipe, system, tmp_path, capsys, monkeypatch
):
    from dldkit.bin import merge_config, sfm_distill_train

    monkeypatch.chdir(tmp_path)
    write_teacher("teacher", layers=12)
    config = recipe / "ssl1" / "conf" / "train_sfm.yaml"
    merge_config.main([str(config), str(system), "model_conf.teacher=teacher"])
    Path("train.yaml").write_text(capsys.readouterr().out)
    soundfile.write("a.wav", np.zeros(16000), 16000)
    Path("wav.scp").write_text("a a.wav\n")

    sfm_distill_train.main(
        "--dry_run true --config train.yaml --output_dir out "
        "--train_data_path_and_name_and_type wav.scp,speech,sound "
        "--valid_data_path_and_name_and_type wav.scp,speech,sound".split()
    )

    built = yaml.safe_load(Path("out/config.yaml").read_text())
    assert (built["trainer"] == "resumable") == (system.stem == "full")
    conf = built["trainer_conf"]
    if system.stem != "full":
        assert conf["depths"] == [3, 6, 9, 12]
        methods = dict(stackbert="stack", every_depth="interleave", fast="interleave")
        assert conf["method"] == methods.get(system.stem, system.stem.split("_")[0])
        is_prop = system.stem in ("interleave_prop1", "every_depth")
        assert (conf["schedule"] == "prop") == is_prop
    assert built["model_conf"].get("freeze_cnn", False) == (system.stem == "fast")
    assert len(built["model_conf"]["teacher_layers"]) == 3
    assert built["best_model_criterion"] == [["valid", "loss", "min"]]
    # 7 % of the steps to warm up, then to zero, however many there are
    assert built["scheduler"] == "transformers"
    assert built["scheduler_conf"] == dict(name="linear", warmup_ratio=0.07)


# The mean depth of the steps of each of two epochs of ten steps: stages of 5 steps, or
# of 2, 4, 6 and 8; every_depth draws depths in the last one.
MEAN_DEPTHS = dict(full=(12, 12), interleave_prop1=(6.6, 11.4), every_depth=(6.6, None))
EQUAL_STAGES = (4.5, 10.5)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda path: path.stem)
def test_every_config_of_the_paper_takes_steps(system, tmp_path, capsys, monkeypatch):
    """Twenty steps of its own batches, at each depth; the layers alone are narrow."""
    from dldkit.bin import merge_config, sfm_distill_train
    from dldkit.sfm.model import SFMDistillModel

    monkeypatch.chdir(tmp_path)
    write_teacher("teacher", layers=12)
    config = ROOT / "egs2" / "librispeech" / "ssl1" / "conf" / "train_sfm.yaml"
    small = {**TINY_STUDENT, "num_hidden_layers": 12}
    words = [f"student_conf.{name}={value}" for name, value in small.items()]
    merge_config.main([str(config), str(system), "model_conf.teacher=teacher", *words])
    Path("train.yaml").write_text(capsys.readouterr().out)
    own = yaml.safe_load(Path("train.yaml").read_text())
    rng = np.random.default_rng(0)
    lengths = [1600 + 80 * (number % 4) for number in range(own["batch_size"])]
    for number, length in enumerate(lengths):
        soundfile.write(f"{number}.wav", 0.1 * rng.standard_normal(length), 16000)
    table = "".join(f"{number} {number}.wav\n" for number in range(len(lengths)))
    Path("wav.scp").write_text(table)
    shapes = "".join(f"{number} {length}\n" for number, length in enumerate(lengths))
    Path("speech_shape").write_text(shapes)
    heard, forward = [], SFMDistillModel.forward

    def recorded(model, speech, *args, **kwargs):
        if model.training:
            heard.append(len(speech))
        return forward(model, speech, *args, **kwargs)

    monkeypatch.setattr(SFMDistillModel, "forward", recorded)
    command = "--config train.yaml --output_dir out --num_iters_per_epoch 10"
    command += " --max_epoch 2 --num_workers 0 --ngpu 0"
    for part in ("train", "valid"):
        command += f" --{part}_data_path_and_name_and_type wav.scp,speech,sound"
        command += f" --{part}_shape_file speech_shape"
    sfm_distill_train.main(command.split())

    assert own["batch_size"] == 64 and heard == [64] * 20
    checkpoint = torch.load("out/checkpoint.pth", weights_only=True)
    assert checkpoint["optimizers"][0]["param_groups"][0]["lr"] == 0
    epochs = checkpoint["reporter"]["stats"]
    losses = [epochs[n][part]["loss"] for n in epochs for part in ("train", "valid")]
    assert np.isfinite(losses).all()
    assert epochs[2]["valid"]["depth"] == 12
    for epoch, depth in enumerate(MEAN_DEPTHS.get(system.stem, EQUAL_STAGES), 1):
        if depth is not None:
            assert epochs[epoch]["train"]["depth"] == pytest.approx(depth)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--stop_stage", "1"], "there is no unlabelled speech: set UNLABELLED"),
        (
            ["--stop_stage", "1", "--local_data_opts", "--unlabelled missing"],
            "missing is not a directory",
        ),
    ],
)
def test_a_distillation_needs_speech(words, complaint, tmp_path):
    recipe = copy_of_the_recipes(tmp_path) / "digits" / "ssl1"
    env = environment(TEACHER="", UNLABELLED="")
    assert complaint in shell("./run.sh", *words, cwd=recipe, status=1, env=env)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Variables that name a teacher, unlabelled speech, and digits.

    The digits are FSDD's where $FSDD is set, else chords that stand for them; the
    unlabelled speech is strung from them, in folders, one of them linked, in two
    formats.
    """
    root = tmp_path_factory.mktemp("speech")
    fsdd = os.environ.get("FSDD")
    rng = np.random.default_rng(0)
    if not fsdd:
        fsdd = root / "fsdd"
        fsdd.mkdir()
        time = np.arange(3200) / 8000
        names = "george jackson lucas nicolas theo yweweler".split()
        for digit, (voice, name) in product(range(10), enumerate(names)):
            chord = np.sin(2 * np.pi * (150 + 20 * voice) * time)
            chord += np.sin(2 * np.pi * 200 * (2 + digit) * time)
            for take in range(50):
                noisy = 0.2 * chord + 0.01 * rng.standard_normal(len(time))
                soundfile.write(fsdd / f"{digit}_{name}_{take}.wav", noisy, 8000)
    recordings = sorted(Path(fsdd).rglob("*.wav"))
    for name, place in (("speaker 0", "unlabelled"), ("speaker 1", "elsewhere")):
        (root / place / name).mkdir(parents=True)
    # folders that are linked count, and one that leads back is no trap
    (root / "unlabelled" / "speaker 1").symlink_to(root / "elsewhere" / "speaker 1")
    (root / "elsewhere" / "speaker 1" / "back").symlink_to(root / "unlabelled")
    for number in range(8):
        chosen = rng.choice(recordings, 4)
        samples = np.concatenate([soundfile.read(path)[0] for path in chosen])
        folder = root / "unlabelled" / f"speaker {number % 2}"
        name = f"{number}.{'wav' if number % 2 else 'flac'}"
        soundfile.write(folder / name, samples, 8000)
    (root / "unlabelled" / "notes.txt").write_text("no audio")
    return dict(
        TEACHER=str(write_teacher(root / "teacher", layers=3)),
        UNLABELLED=str(root / "unlabelled"),
        FSDD=str(fsdd),
    )


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, speech):
    """digits/ssl1 with a tiny student that grows; what stages 1-15 printed."""
    recipe = copy_of_the_recipes(tmp_path_factory.mktemp("recipes"))
    recipe = recipe / "digits" / "ssl1"
    config = yaml.safe_load((recipe / "conf" / "train_sfm.yaml").read_text())
    config.update(
        student_conf=TINY_STUDENT, batch_size=4, num_iters_per_epoch=3, max_epoch=4
    )
    config["keep_nbest_models"] = 2
    config["model_conf"]["teacher_layers"] = [2, 3]
    (recipe / "conf" / "train_sfm.yaml").write_text(yaml.safe_dump(config))
    (recipe / "conf" / "systems").mkdir(exist_ok=True)
    (recipe / "conf" / "systems" / "interleave_eql.yaml").write_text(
        # 7 of 12 steps: it grows in the third of four epochs
        "trainer_conf: {depths: [2, 4], schedule: fractions, fractions: [0.6, 0.4]}\n"
    )

    def run(*words, status=0, **variables):
        command = ["./run.sh", "--system", "interleave_eql", "--num_threads", "1"]
        command += ["--nj", "1", "--local_data_opts", f"{SMALL} --num_probe_test 6"]
        env = environment(**{**speech, **variables})
        return shell(*command, *words, cwd=recipe, status=status, env=env)

    return recipe, run, run("--export_depths", "2")


def table_of(path):
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines())


def test_data_of_a_distillation(distilled, speech):
    recipe, _, _ = distilled
    for root in (recipe / "data", recipe / "dump" / "raw"):
        train, valid = table_of(root / "train/wav.scp"), table_of(
            root / "valid/wav.scp"
        )
        files = {utt for utt in {**train, **valid} if utt.startswith("speaker_")}
        assert files == {f"speaker_{n % 2}-{n}" for n in range(8)}
        held_out = sorted(files)[0], sorted(files)[4]
        assert files & set(valid) == set(held_out)
        assert len(train) == 6 + 10 and len(valid) == 2 + 2
        assert not set(train) & set(valid)
        for name in ("train", "valid"):
            assert not (root / name / "text").exists()
        for name, size in (("digits_train", 600), ("digits_test", 300)):
            text, speakers = table_of(root / name / "text"), table_of(
                root / name / "utt2spk"
            )
            assert len(text) == size and len(set(speakers.values())) == 6
            assert len(set(text.values())) == 10
        assert len(table_of(root / "strings_test/text")) == 6
    takes = {utt.split("-")[2] for utt in table_of(recipe / "data/digits_test/text")}
    assert takes == {"00", "01", "02", "03", "04"}  # FSDD's own test set
    used = " ".join(table_of(recipe / "data/strings_train/utt2recordings").values())
    assert not {f"{t}" for t in range(10)} & {r.split("_")[2] for r in used.split()}
    for wav in list(table_of(recipe / "dump/raw/train/wav.scp").values()):
        assert soundfile.info(recipe / wav).samplerate == 16000


def test_all_stages_of_a_distillation(distilled, speech):
    from transformers import AutoModel

    recipe, _, printed = distilled
    for stage in (1, 3, 4, *range(9, 16)):
        assert f"Stage {stage}: " in printed
    assert "4epoch results: [train] " in printed
    exp = recipe / "exp" / "sfm_interleave_eql"
    config = yaml.safe_load((exp / "config.yaml").read_text())
    assert config["model_conf"]["teacher"] == "exp/targets_teacher_cut2.0_layers2-3"
    assert config["trainer_conf"]["depths"] == [2, 4]
    lengths = table_of(recipe / "dump/raw/train_cut2.0/utt2num_samples")
    assert max(map(int, lengths.values())) <= 32000
    stats = recipe / "exp/sfm_stats_train_valid_cut2.0"
    assert table_of(stats / "train/speech_shape") == lengths
    assert set(
        table_of(recipe / "exp/targets_teacher_cut2.0_layers2-3/targets.scp")
    ) == {
        *lengths,
        *table_of(recipe / "dump/raw/valid_cut2.0/wav.scp"),
    }
    # float16 is all that the cache costs: teacher and student hear the same
    own = json.loads((exp / "teacher_loss.json").read_text())
    assert 0 < own["loss"] < 1e-4
    assert "the teacher's own loss on the student's input: loss=" in printed
    # the average holds epochs of full depth alone: the last two of four
    averaged = os.readlink(exp / "valid.loss.ave.pth")
    average, third, fourth = (
        torch.load(exp / name) for name in (averaged, "3epoch.pth", "4epoch.pth")
    )
    for key, value in average.items():
        torch.testing.assert_close(value, (third[key] + fourth[key]) / 2)
    for name, layers in (("hf", 4), ("hf_depth2", 2)):
        model = AutoModel.from_pretrained(exp / name)
        assert model.config.num_hidden_layers == layers
    for row in ("teacher", "interleave_eql", "interleave_eql_depth2"):
        for text in (printed, (exp / "RESULTS.md").read_text()):
            assert f"| {row} " in text

    names = zipfile.ZipFile(
        exp / "pack_valid.loss.ave" / "interleave_eql.zip"
    ).namelist()
    files = "config.yaml valid.loss.ave.pth RESULTS.md hf/model.safetensors"
    assert {*files.split(), "hf_depth2/config.json", "meta.yaml"} <= set(names)
    assert not [name for name in names if "targets" in name or "checkpoint" in name]
    card = exp / "huggingface" / "README.md"
    front = yaml.safe_load(card.read_text().split("---")[1])
    assert front["library_name"] == "transformers" and front["datasets"] == ["digits"]
    found: dict = dict(speech=np.zeros(16000))
    exec(snippet_of(card), found)
    assert len(found["hidden_states"]) == 5


@pytest.mark.slow
def test_a_second_distillation_keeps_everything(distilled):
    recipe, run, _ = distilled
    patterns = "sfm_*/*epoch.pth sfm_*/*/*.zip sfm_stats_*/*/* targets_*/*"
    patterns += " hidden_states/*/*.pt"
    kept = [path for p in patterns.split() for path in (recipe / "exp").glob(p)]
    kept = [path for path in kept if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) > 15
    printed = run("--export_depths", "2")
    assert "epoch results" not in printed
    assert "| interleave_eql " in printed  # the table is shown again
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_fast_distillation_reads_no_audio(distilled, speech):
    """Its CNN is the teacher's, whose features are cached beside the targets."""
    from transformers import AutoModel

    recipe, run, _ = distilled
    (recipe / "conf" / "systems" / "fast.yaml").write_text(
        "trainer_conf: {depths: [2, 4], schedule: equal}\n"
    )
    words = "--system fast --targets cached_features --probe none --skip_packing true"
    printed = run("--stage", 9, "--stop_stage", 12, *words.split())
    assert "CNN features of 8 values: " in printed
    assert "Collecting targets" not in printed  # those of the first training stay
    exp = recipe / "exp" / "sfm_fast"
    config = yaml.safe_load((exp / "config.yaml").read_text())
    for part in ("train", "valid"):
        files = {f[1]: f[0] for f in config[f"{part}_data_path_and_name_and_type"]}
        assert files == dict(
            speech="exp/targets_teacher_cut2.0_layers2-3/features/features.scp",
            targets="exp/targets_teacher_cut2.0_layers2-3/targets.scp",
        )
    own = json.loads((exp / "teacher_loss.json").read_text())
    assert 0 < own["loss"] < 1e-4
    ours, theirs = (
        AutoModel.from_pretrained(path).feature_extractor.state_dict()
        for path in (exp / "hf", speech["TEACHER"])
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_teacher_has_targets_of_its_own(distilled, tmp_path):
    _, run, _ = distilled
    teacher = write_teacher(tmp_path / "other", layers=3)
    text = run("--stage", 11, "--stop_stage", 11, status=1, TEACHER=str(teacher))
    targets = "exp/targets_other_cut2.0_layers2-3/targets.scp"
    assert f"{targets} does not exist: run stage 9 first" in text


def test_run_sh_of_a_distillation_resumes_it(distilled):
    recipe, _, _ = distilled
    exp = recipe / "exp" / "sfm_interleave_eql"
    shell(exp / "run.sh", "--max_epoch", "5", cwd="/")
    assert (exp / "5epoch.pth").exists()
    assert (exp / "train.log").read_text().count("1epoch results") == 1


@pytest.mark.slow
def test_the_comparison_of_growing_students(distilled, speech):
    """Last: it changes the README of the copy."""
    recipe, _, _ = distilled
    words = ["--systems", "full interleave_eql", "--more_seeds", "2"]
    words += ["--more_seeds_for", "full", "--probe_seeds", "0", "--num_threads", "1"]
    words += ["--learning_rates", "0.00001 0.004", "--grid_epochs", "3"]
    exp = recipe / "exp" / "compare"
    exp.mkdir(parents=True)
    results = exp / "results"  # those of the recipe would stand for these runs
    words += ["--results", results]
    times = dict(depths={"4": 1.0}, schedules=dict(equal=0.75, prop1=0.8))
    results.mkdir()
    (results / "step_time.json").write_text(json.dumps(times))
    words += ["--run_opts", f"--local_data_opts '{SMALL} --num_probe_test 6'"]
    command = ["local/compare.sh", *words]
    shell(*command, cwd=recipe, env=environment(**speech))

    def rows() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for line in (recipe / "README.md").read_text().splitlines():
            if line.startswith("|"):
                name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
                found.setdefault(name, cells)
        return found

    first = rows()
    assert first["full"][:3] == ["2", "0.004", "1.00"]
    assert first["interleave_eql"][0] == "1" and first["interleave_eql"][2] == "0.75"
    assert first["teacher"][:3] == first["untrained"][:3] == [""] * 3
    assert 0 < float(first["teacher"][3]) < 1e-4 and not first["untrained"][3]
    assert first["learning rate"] == ["1e-05", "0.004"]
    result = json.loads((results / "full_seed1.json").read_text())
    log = (exp / "sfm_full_seed1" / "train.log").read_text()
    last = re.findall(r"4epoch results: .*\[valid\] .*?\bloss=([0-9.]+)", log)[-1]
    assert result["loss"]["4"] == pytest.approx(float(last), rel=0.01)
    for file in results.glob("*_seed*.json"):
        for scores in json.loads(file.read_text())["scores"].values():
            assert all(value >= 0 for values in scores.values() for value in values)
    # elsewhere, what is recorded is not trained again, and its learning rate is known
    for run in ("full_seed1", "interleave_eql_seed1", "full_lr0.004_seed1"):
        shutil.rmtree(exp / f"sfm_{run}")
    (results / "full_seed2.json").unlink()
    shell(*command, cwd=recipe, env=environment(**speech))
    again = rows()
    assert again == first
    assert not (exp / "sfm_full_lr0.004_seed1").exists()
    assert not (exp / "sfm_full_seed1" / "checkpoint.pth").exists()
    other = ["--sfm_args", "--max_epoch 9"]
    text = shell(*command, *other, cwd=recipe, env=environment(**speech), status=1)
    assert "has runs with sfm_args '', not '--max_epoch 9': choose another" in text
