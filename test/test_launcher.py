import os
import sys

import pytest
import yaml

from dldkit import launcher


def test_packs_a_model_of_ours_with_espnets_module(student, python, tmp_path):
    """The whole way: a real process, and a zip that holds the model."""
    zip_file = tmp_path / "model.zip"
    pack = ["-m", "espnet2.bin.pack", "asr", "--outpath", zip_file]
    files = ["--asr_train_config", "config.yaml"]
    files += ["--asr_model_file", "valid.loss_ctc.ave.pth"]
    result = python("-m", "dldkit", *pack, *files, cwd=student)
    assert f"Generate: {zip_file}" in result.stdout
    from dldkit.asr.loading import load_asr_model

    model, args = load_asr_model(zip_file)
    assert args.model == "dld"
    assert model.encoder.active_layers == (0, 1, 2, 3)


def test_espnets_training_knows_our_names(corpus, monkeypatch, tmp_path, capsys):
    """As an ESPnet recipe with `--python "python3 -m dldkit"` calls it."""
    command = corpus.training(
        tmp_path / "exp", encoder="ld_conformer", model="dld", dry_run=True
    )
    argv = ["dldkit", "-m", "espnet2.bin.asr_train", *command]
    monkeypatch.setattr(sys, "argv", argv)
    launcher.main()
    config = yaml.safe_load((tmp_path / "exp" / "config.yaml").read_text())
    assert config["encoder"] == "ld_conformer"
    assert config["model"] == "dld"


@pytest.mark.parametrize("argv", [[], ["espnet2.bin.pack"], ["-m"], ["-c", "1"]])
def test_says_how_to_use_it(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dldkit", *argv])
    with pytest.raises(SystemExit, match=r"usage: python -m dldkit -m MODULE"):
        launcher.main()


SPAWNING = """
import multiprocessing
import sys

import spawned_child

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=spawned_child.print_choices)
    process.start()
    process.join()
    print("arguments", sys.argv[1:])
"""
CHILD = """
def print_choices():
    from espnet2.tasks.asr import encoder_choices, model_choices

    known = {**encoder_choices.classes, **model_choices.classes}
    print("child knows", sorted(n for n in known if n.startswith(("ld_", "dld"))))
"""


@pytest.mark.integration
def test_spawned_processes_know_our_names(python, tmp_path, monkeypatch):
    """Multi-GPU training spawns its workers."""
    (tmp_path / "spawning.py").write_text(SPAWNING)
    (tmp_path / "spawned_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    result = python("-m", "dldkit", "-m", "spawning", "--an", "option")
    names = "'dld', 'ld_branchformer', 'ld_conformer', 'ld_e_branchformer', 'ld_hf'"
    assert f"child knows [{names}, 'ld_transformer']" in result.stdout
    assert "arguments ['--an', 'option']" in result.stdout
