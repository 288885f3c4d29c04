"""Which models can be scored, and what they cost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModel

from dldkit.errors import UserError
from dldkit.sfm.superb.upstream import cost_of, find_upstream, s3prl_hub

pytest.importorskip("s3prl", reason="the extra superb is not installed")


def macs_by_hand(config, samples: int) -> int:
    """Count a HuBERT's products: its CNN, and of each layer, what the paper draws."""
    frames, channels, macs = samples, 1, 0
    for out, kernel, stride in zip(
        config.conv_dim, config.conv_kernel, config.conv_stride
    ):
        frames = (frames - kernel) // stride + 1
        macs += frames * out * kernel * channels
        channels = out
    dim, inner = config.hidden_size, config.intermediate_size
    kernel, groups = (
        config.num_conv_pos_embeddings,
        config.num_conv_pos_embedding_groups,
    )
    # an even kernel makes a frame too much, which is thrown away
    macs += frames * channels * dim + (frames + 1) * kernel * dim * dim // groups
    layer = 4 * frames * dim**2 + 2 * frames**2 * dim + 2 * frames * dim * inner
    return macs + config.num_hidden_layers * layer


def test_cost_of_a_student_is_that_counted_by_hand(upstream):
    found = find_upstream(str(upstream))
    model = AutoModel.from_pretrained(upstream)
    assert (found.name, found.directory) == ("hf_hubert_custom", upstream)
    assert cost_of(found) == {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs_by_hand(model.config, 160000),
    }


@pytest.mark.parametrize("family", ["wavlm", "wav2vec2", "hubert_stable"])
def test_s3prl_gets_the_hidden_states_of_any_family(wave_teacher, family):
    """As transformers computes them, of a whole utterance."""
    model, directory = wave_teacher(family)
    found = find_upstream(str(directory))
    speech = 0.1 * torch.randn(6000, generator=torch.Generator().manual_seed(0))
    theirs = s3prl_hub().hf_hubert_custom(ckpt=str(found.directory)).eval()
    heard = speech
    if family.endswith("stable"):
        heard = (speech - speech.mean()) / (speech.var(correction=0) + 1e-7).sqrt()
    with torch.no_grad():
        states = theirs([speech])["hidden_states"]
        expected = model(heard[None], output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    for ours, state in zip(states, expected):
        torch.testing.assert_close(ours, state, rtol=1e-3, atol=1e-4)


def test_a_name_of_the_hub_is_found_in_its_cache(upstream, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "1234"
    shutil.copytree(upstream, snapshot)
    reference = snapshot.parents[1] / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("1234")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = find_upstream("someone/tiny")
    assert found.directory == snapshot
    assert found.identity == find_upstream(str(upstream)).identity
    with pytest.raises(UserError, match="someone/other: no such directory, and the"):
        find_upstream("someone/other")


def test_an_upstream_of_s3prl_needs_no_directory():
    found = find_upstream("fbank")
    assert (found.name, found.directory, found.identity) == ("fbank", None, "fbank")
    assert cost_of(found)["parameters"] == 0
    with pytest.raises(UserError, match="none of s3prl's upstreams .distilhubert"):
        find_upstream("distilhuber")


def test_other_directories_are_refused(upstream, tmp_path):
    with pytest.raises(UserError, match="has no config.json, prepro.*sfm_export"):
        find_upstream(str(tmp_path))
    shutil.copytree(upstream, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match="is a bert model: choose one of hubert, wavlm"):
        find_upstream(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        find_upstream(str(tmp_path))


def test_weights_that_are_missing_are_not_made_up(wave_teacher):
    _, directory = wave_teacher("wavlm")
    config = json.loads((Path(directory) / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (Path(directory) / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the upstream .* lacks .* of the weights"):
        cost_of(find_upstream(str(directory)))
