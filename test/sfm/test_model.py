import copy
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from espnet2.torch_utils.device_funcs import to_device
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model

from dldkit.errors import UserError
from dldkit.sfm.data import CropCollateFn
from dldkit.sfm.export import plain_hubert
from dldkit.sfm.model import SFMDistillModel
from dldkit.sfm.teacher.opening import open_teacher
from dldkit.sfm.wave import normalize_speech

STABLE = dict(do_stable_layer_norm=True, feat_extract_norm="layer")
NO_DROPOUT = dict(hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0)


@pytest.fixture
def make(student_conf):
    """Return a function that builds a model with a teacher of 3 layers of 16."""

    def model(teacher=None, student={}, seed=0, **options):
        options = {
            "teacher_layers": [1, 2, 3],
            "teacher_size": 16,
            "normalize": False,
            **options,
        }
        torch.manual_seed(seed)
        return SFMDistillModel(
            {**student_conf, **student}, teacher=str(teacher), **options
        )

    return model


@pytest.fixture
def batch(waveforms):
    """What the trainer gives the model."""
    speech, lengths = waveforms
    return dict(
        speech=speech,
        speech_lengths=lengths,
        utt_id=["a", "b"],
    )


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def cnn(model):
    return snapshot(model.student.feature_extractor)


def train(model, batch, steps=3):
    """Run steps of training; return each one's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    losses = []
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        loss, _, _ = model(**batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_a_perfect_student(model, teacher, batch, tolerance):
    """Give the student the teacher's weights: then there is nothing to learn."""
    states = teacher.state_dict()
    del states["masked_spec_embed"]
    model.student.load_state_dict(states)
    for projection in (model.loss.output_projection, *model.loss.layer_projections):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    loss, stats, weight = model.eval()(**batch)
    assert int(weight) == len(batch["speech"])
    assert loss.item() < tolerance
    with torch.no_grad():  # one layer less of agreement
        model.student.encoder.layers[1].final_layer_norm.bias[0] += 3
    later = model(**batch)[1]
    assert later["loss_layer1"] == stats["loss_layer1"]
    assert min(later[f"loss_layer{n}"] for n in (2, 3)) > 100 * tolerance
    assert later["loss_output"] > 100 * tolerance


@pytest.mark.parametrize("normalize", [False, True])
def test_a_student_that_is_its_teacher_has_no_loss(
    make, wave_teacher, batch, normalize
):
    """The same speech, the same frames, the right layers."""
    teacher, directory = wave_teacher()
    if normalize:
        file = directory / "preprocessor_config.json"
        text = file.read_text()
        assert '"do_normalize": false' in text
        file.write_text(text.replace('"do_normalize": false', '"do_normalize": true'))
    twin = dict(hidden_size=16, num_hidden_layers=3)
    model = make(directory, twin, normalize=normalize)
    assert_a_perfect_student(model, teacher, batch, 1e-9)


@pytest.mark.parametrize("family", ["hubert", "hubert_stable", "wavlm"])
def test_padding_changes_nothing(make, wave_teacher, waveforms, family):
    """Teacher and student hear each utterance of a batch as if it were alone."""
    directory = wave_teacher(family)[1]
    stable = dict(do_stable_layer_norm=True, feat_extract_norm="layer")
    student = stable if family == "hubert_stable" else {}
    model = make(directory, student, normalize=True).eval()
    speech, lengths = waveforms
    whole, _, _ = model(speech, lengths)
    one, _, _ = model(speech[:1], lengths[:1])
    other, _, _ = model(speech[1:, :6010], lengths[1:])
    frames = 27, 18
    mean = (frames[0] * one + frames[1] * other) / sum(frames)
    assert whole.item() == pytest.approx(mean.item(), rel=1e-5)


MASKS = dict(mask_time_prob=0.5, mask_time_length=4)


@pytest.mark.parametrize("options", [dict(), dict(cnn_init="teacher", freeze_cnn=True)])
def test_the_teacher_hears_what_is_masked_for_the_student(
    make, wave_teacher, batch, options
):
    """And all frames count: the loss is that of a student that hears less."""
    _, directory = wave_teacher()
    student = {**NO_DROPOUT, "feat_proj_dropout": 0.0}
    whole = make(directory, student, **options)
    model = make(directory, {**student, **MASKS}, **options)
    whole.open_teacher("cpu")  # which may give it a CNN
    seen = []
    for m in whole, model:
        m.loss.register_forward_pre_hook(lambda _, args: seen.append(args))
        m.student.load_state_dict(whole.student.state_dict(), strict=False)
        m.loss.load_state_dict(whole.loss.state_dict())
    losses = [m.train()(**batch)[0] for m in (whole, model)]
    assert losses[0] != losses[1]
    losses[1].backward()
    assert model.student.masked_spec_embed.grad.any()
    (student, teacher, lengths, _), (masked, heard, frames, _) = seen
    assert all(torch.equal(a, b) for a, b in zip(teacher, heard))
    assert not torch.equal(student[0], masked[0]) and frames.equal(lengths)
    assert whole.eval()(**batch)[0] == model.eval()(**batch)[0]


@pytest.mark.parametrize("options", [dict(), dict(cnn_init="teacher", freeze_cnn=True)])
def test_the_teacher_hears_clean_speech(make, wave_teacher, batch, options):
    """Also where one CNN could serve both."""
    _, directory = wave_teacher()
    model, seen = make(directory, **options).eval(), []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args))
    noisy = batch["speech"] + 0.1 * torch.randn(2, 9000)
    calls = count_cnn_calls(model)
    model(**{**batch, "speech": noisy}, clean=batch["speech"])
    assert sorted(calls) == ["student", "teacher"]
    ((student, teacher, _, _),) = seen
    lengths = batch["speech_lengths"]
    expected, _ = open_teacher(directory, [1, 2, 3])(batch["speech"], lengths)
    assert all(torch.equal(a, b) for a, b in zip(teacher, expected))
    states = model.hidden_states(noisy, lengths)
    assert all(torch.equal(a, b) for a, b in zip(student, states))


def test_a_student_that_was_masked_is_exported_without(make):
    model = make(student=MASKS)
    plain = plain_hubert(model.student, [0, 1, 2, 3])
    assert plain.config.mask_time_prob == 0
    assert "masked_spec_embed" in model.student.state_dict()
    assert "masked_spec_embed" not in plain.state_dict()


@pytest.mark.parametrize("family", ["hubert", "hubert_stable", "wavlm", "whisper"])
@pytest.mark.parametrize("options", [dict(), dict(cnn_init="teacher", freeze_cnn=True)])
def test_a_step_waits_for_no_value(
    make, wave_teacher, whisper_teacher, family, options, monkeypatch
):
    """On the device `meta` there are no values: whoever asks for one, fails."""
    if family == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        directory, options = whisper_teacher(WhisperEncoder)[1], {}
    else:
        directory = wave_teacher(family)[1]
    if family == "hubert_stable":
        options = {}
    student = {**NO_DROPOUT, **MASKS}
    model = make(directory, student, normalize=True, **options).train()
    utterances = [(u, {"speech": np.ones(9000, np.float32)}) for u in "ab"]
    utts, batch = CropCollateFn(train=True)(utterances)
    model(**batch)  # opens the teacher, and compares CNNs
    model.to("meta")
    # which there is for all devices but this one
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    batch = to_device(batch, "meta")
    loss, stats, weight = model(**batch, utt_id=utts)
    loss.sum().backward()
    assert {x.device.type for x in (loss, weight, *stats.values())} == {"meta"}
    del batch["lengths_on_host"]  # the test would see that lengths are read back
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        model(**batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_the_gpu_waits_for_no_value(make, wave_teacher):
    model = make(wave_teacher()[1], {**NO_DROPOUT, **MASKS}).cuda().train()
    utterances = [(u, {"speech": np.ones(9000, np.float32)}) for u in "ab"]
    _, batch = CropCollateFn(train=True)(utterances)
    batch = to_device(batch, "cuda")
    model(**batch)[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_takes_speech_as_the_teacher_does(make, waveforms):
    speech, lengths = waveforms
    raw, normal = make().eval(), make(normalize=True).eval()
    with torch.no_grad():
        expected = raw.hidden_states(normalize_speech(speech, lengths), lengths)
        found = normal.hidden_states(speech, lengths)
        other = raw.hidden_states(speech, lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not torch.allclose(found[0], other[0], atol=1e-3)


def test_reports_the_parts_of_the_loss(make, wave_teacher, batch):
    model = make(wave_teacher()[1], layer_weight=0.3).eval()
    loss, stats, _ = model(**batch)
    parts = [stats[f"loss_layer{n}"] for n in (1, 2, 3)]
    total = stats["loss_output"] + 0.3 * sum(parts) / 3
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert stats["loss"] == loss and stats["depth"] == 4


def test_student_layers_override_the_carriers(make, wave_teacher, batch):
    """At the depths that it names, and only there."""
    directory = wave_teacher()[1]
    usual = make(directory).eval()
    model = make(directory, student_layers={4: [1, 1, 2], "2": [1, 1, 1]}).eval()
    for depth, carried_by in ((4, [1, 1, 2]), (3, None), (2, [1, 1, 1]), (1, None)):
        for m in (usual, model):
            m.student.encoder.layers.select(range(depth))
        states = usual.hidden_states(batch["speech"], batch["speech_lengths"])
        targets, lengths = usual.open_teacher("cpu")(
            batch["speech"], batch["speech_lengths"]
        )
        expected, _ = usual.loss(states, targets, lengths, carried_by)
        assert model(**batch)[0] == expected
        changes = carried_by is not None and depth > 1
        assert (expected != usual(**batch)[0]) == changes


def test_the_last_layer_may_carry_all(make, wave_teacher, batch):
    """At every depth, but where student_layers says otherwise."""
    directory = wave_teacher()[1]
    options = dict(carried_by="last", student_layers={2: [1, 1, 2]})
    model = make(directory, **options).eval()
    targets, lengths = model.open_teacher("cpu")(
        batch["speech"], batch["speech_lengths"]
    )
    for depth, expected in ((4, [4, 4, 4]), (3, [3, 3, 3]), (2, [1, 1, 2])):
        model.student.encoder.layers.select(range(depth))
        states = model.hidden_states(batch["speech"], batch["speech_lengths"])
        assert model(**batch)[0] == model.loss(states, targets, lengths, expected)[0]


@pytest.mark.parametrize(
    "layers", [{4: [1, 2]}, {4: [1, 2, 5]}, {3: [0, 1, 2]}, {3: [1, 2, 3, 3]}]
)
def test_refuses_student_layers_that_do_not_fit(make, layers):
    with pytest.raises(UserError, match="student_layers .*list 3 layers from 1 to"):
        make(student_layers=layers)


@pytest.mark.parametrize("depth", [99, 0, "deep"])
def test_refuses_student_layers_of_no_depth(make, depth):
    with pytest.raises(UserError, match=f"{depth}: write depths from 1 to 4"):
        make(student_layers={depth: [1, 1, 1]})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(cnn_init="copy"), "unknown cnn_init 'copy': choose teacher or null"),
        (dict(loss="l2"), "unknown loss 'l2'"),
        (dict(carried_by="first"), "carried_by 'first': choose position, copies, last"),
        (dict(depth_sampler="half"), "unknown depth_sampler 'half'"),
        (dict(depth_sampler="uniform", min_depth=5), "min_depth 5"),
        (dict(teacher_layers=[3, 1]), "ascending"),
        (dict(layer_init=[0, 1]), "layer_init .*list teacher layers from 1"),
        (dict(layer_init=[1] * 5), "layer_init .*for 4 layers of the student at most"),
    ],
    ids=str,
)
def test_refuses_wrong_options(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize("options", [dict(), dict(cnn_init="teacher", freeze_cnn=True)])
def test_training_leaves_the_teacher_alone(make, wave_teacher, batch, options):
    _, directory = wave_teacher("hubert", hidden_dropout=0.5, layerdrop=0.5)
    model = make(directory, **options)
    names = list(model.state_dict())
    teacher = model.open_teacher("cpu").model
    before = snapshot(teacher)
    losses = train(model, batch, 4)
    assert losses[-1] < losses[0]
    assert same(before, teacher.state_dict())
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    # nor is it a part of the model
    assert list(model.state_dict()) == names
    assert {name.split(".")[0] for name in names} == {"student", "loss"}
    theirs = {id(p) for p in teacher.parameters()} | {id(m) for m in teacher.modules()}
    assert not theirs & {id(p) for p in model.parameters()}
    assert not theirs & {id(m) for m in model.modules()}


def test_the_cnn_is_the_teachers(make, wave_teacher, batch):
    teacher, directory = wave_teacher()
    model, other = make(directory, cnn_init="teacher").eval(), make(directory).eval()
    assert not same(cnn(model), teacher.feature_extractor.state_dict())
    rest = snapshot(model.student.encoder)
    model(**batch), other(**batch)
    assert same(cnn(model), teacher.feature_extractor.state_dict())
    assert same(rest, model.student.encoder.state_dict())
    assert not same(cnn(other), teacher.feature_extractor.state_dict())


def test_a_resumed_run_keeps_the_cnn_that_it_trained(make, wave_teacher, batch):
    teacher, directory = wave_teacher()
    model = make(directory, cnn_init="teacher")
    train(model, batch)
    trained = cnn(model)
    assert not same(trained, teacher.feature_extractor.state_dict())
    resumed = make(directory, seed=1, cnn_init="teacher")
    resumed.load_state_dict(model.state_dict())
    resumed.eval()(**batch)
    assert same(cnn(resumed), trained)


def test_what_init_param_leaves_out_is_still_the_teachers(make, wave_teacher, tmp_path):
    """ESPnet loads the whole model again, though the file has one part of it."""
    teacher, directory = wave_teacher()
    states = make(None, student=TWIN, seed=1).student.encoder.layers[0].state_dict()
    torch.save(states, tmp_path / "layer.pth")
    model = make(directory, student=TWIN, cnn_init="teacher", layer_init=[1])
    path = f"{tmp_path}/layer.pth::student.encoder.layers.0"
    load_pretrained_model(path, model, ignore_init_mismatch=False)
    model.open_teacher("cpu")
    assert same(cnn(model), teacher.feature_extractor.state_dict())
    assert same(snapshot(model.student.encoder.layers[0]), states)


@pytest.mark.parametrize("wrong", [dict(conv_dim=[4] * 7), dict(conv_bias=True)])
def test_refuses_a_cnn_that_does_not_fit(make, wave_teacher, batch, wrong):
    model = make(wave_teacher()[1], wrong, cnn_init="teacher")
    with pytest.raises(UserError, match="(?s)cnn_init: teacher.*does not fit.*: null"):
        model(**batch)


def test_refuses_the_cnn_of_a_teacher_without(make, whisper_teacher, batch):
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    model = make(whisper_teacher(WhisperEncoder)[1], cnn_init="teacher")
    with pytest.raises(UserError, match="has no CNN on waveforms"):
        model(**batch)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_cnn_stays_as_it_is(make, wave_teacher, batch, freeze):
    model = make(wave_teacher()[1], freeze_cnn=freeze)
    before, rest = cnn(model), snapshot(model.student.encoder)
    train(model, batch)
    assert same(cnn(model), before) == freeze
    assert not same(model.student.encoder.state_dict(), rest)
    grads = [p.grad for p in model.student.feature_extractor.parameters()]
    assert all((grad is None) == freeze for grad in grads)


def count_cnn_calls(model):
    """Return a list that grows by a name with each forward of a CNN."""
    calls = []
    ours, theirs = model.student, model.open_teacher("cpu").model
    for name, part in (("student", ours), ("teacher", theirs)):
        part.feature_extractor.register_forward_hook(
            lambda *_, name=name: calls.append(name)
        )
    return calls


@pytest.mark.parametrize("family", ["hubert", "wavlm", "hubert_stable"])
def test_a_frozen_cnn_of_the_teacher_runs_once(make, wave_teacher, batch, family):
    _, directory = wave_teacher(family)
    normalize = family == "hubert_stable"
    student = dict(NO_DROPOUT)
    if normalize:
        student.update(do_stable_layer_norm=True, feat_extract_norm="layer")
    options = dict(student=student, cnn_init="teacher", normalize=normalize)
    shared = make(directory, freeze_cnn=True, **options)
    separate = make(directory, **options)
    calls = count_cnn_calls(shared), count_cnn_calls(separate)
    losses = [m.train()(**batch)[0] for m in (shared, separate)]
    assert calls[0] == ["student"]
    assert sorted(calls[1]) == ["student", "teacher"]
    assert losses[0] == losses[1]
    for loss in losses:
        loss.backward()
    ours, theirs = (
        {
            name: parameter.grad
            for name, parameter in m.named_parameters()
            if "feature_extractor" not in name
        }
        for m in (shared, separate)
    )
    assert same(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        dict(cnn_init="teacher", freeze_cnn=True, normalize=True),
        dict(cnn_init=None, freeze_cnn=True),
        dict(cnn_init="teacher", freeze_cnn=False),
    ],
    ids=["hears other speech", "has other weights", "learns"],
)
def test_a_cnn_that_differs_is_not_shared(make, wave_teacher, batch, options):
    _, directory = wave_teacher()
    model = make(directory, **options)
    expected, _ = open_teacher(directory, [1, 2, 3])(*list(batch.values())[:2])
    calls, seen = count_cnn_calls(model), []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model.eval()(**batch)
    assert sorted(calls) == ["student", "teacher"]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected))


def end_step():
    """Let an optimiser make a step, as it does after each batch."""
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()


def test_each_training_step_draws_layers(make, wave_teacher, batch):
    model = make(wave_teacher()[1], depth_sampler="bernoulli", keep_prob=0.5)
    ran, slots = [], list(model.student.encoder.layers.children())
    for slot, layer in enumerate(slots):
        layer.register_forward_hook(lambda *_, slot=slot: ran.append(slot))
    drawn = set()
    for _ in range(12):
        ran.clear()
        model.train()
        model.zero_grad(set_to_none=True)
        loss, stats, _ = model(**batch)
        loss.backward()
        assert stats["depth"] == len(ran) >= 1
        for slot, layer in enumerate(slots):
            for parameter in layer.parameters():
                assert (parameter.grad is not None) == (slot in ran)
        drawn.add(tuple(ran))
        end_step()
    assert len(drawn) > 4
    ran.clear()
    model.eval()
    assert model(**batch)[1]["depth"] == 4 and ran == [0, 1, 2, 3]


def test_a_grown_student_draws_from_the_slots_that_are_on(make, wave_teacher, batch):
    model = make(wave_teacher()[1], depth_sampler="uniform").train()
    layers = model.student.encoder.layers
    layers.select(range(2))
    drawn = set()
    for _ in range(20):
        model(**batch)
        drawn.add(layers.active)
        end_step()
    assert drawn == {(0,), (1,), (0, 1)}


def cached(directory, layers=(1, 2, 3)):
    """Describe cached targets, as the collection does."""
    directory.mkdir()
    description = dict(
        teacher="gone",
        hidden_size=16,
        num_layers=3,
        sampling_rate=16000,
        normalize=False,
        layers=list(layers),
    )
    (directory / "teacher.yaml").write_text(yaml.safe_dump(description))
    return directory


@pytest.mark.parametrize("family", ["hubert", "hubert_stable", "wavlm", "whisper"])
def test_cached_loss_is_the_live_one(
    make, wave_teacher, whisper_teacher, tmp_path, family
):
    """Segments of two lengths in one batch: each was heard alone by the teacher."""
    if family == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        directory = whisper_teacher(WhisperEncoder)[1]
    else:
        directory = wave_teacher(family)[1]
    rng = np.random.default_rng(0)
    opened, data = open_teacher(directory, [1, 2, 3]), []
    for utt, n in dict(a=9600, b=8000, c=9600).items():
        speech = rng.standard_normal(n).astype(np.float32)
        states, _ = opened(torch.tensor(speech)[None], torch.tensor([n]))
        targets = torch.stack(states, 2)[0].half().float().numpy()
        data.append((utt, {"speech": speech, "targets": targets}))
    _, batch = CropCollateFn(train=True)(data)
    cached_model = make(cached(tmp_path / "targets")).eval()
    live_model = make(directory).eval()
    live = {k: v for k, v in batch.items() if "targets" not in k}
    found, stats, _ = cached_model(**batch)
    expected, live_stats, _ = live_model(**live)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, value in live_stats.items():
        assert stats[name].item() == pytest.approx(value.item(), rel=1e-3), name


def test_only_the_layers_that_are_asked_for_are_learnt(make, tmp_path):
    """The cache has layers 1, 2 and 3; each target says which it is."""
    model = make(cached(tmp_path / "targets"), teacher_layers=[2, 3])
    seen = []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    targets = torch.tensor([1.0, 2, 3])[:, None].expand(2, 20, 3, 16)
    batch = dict(speech=torch.randn(2, 6420), speech_lengths=torch.tensor([6420] * 2))
    model(**batch, targets=targets, targets_lengths=torch.tensor([20, 20]))
    assert [target.unique().tolist() for target in seen[0]] == [[2.0], [3.0]]


def test_means_of_layers_are_learnt_from_a_live_teacher(make, wave_teacher, batch):
    """Two targets for the first and the last half of four layers."""
    _, directory = wave_teacher()
    model, seen = make(directory, teacher_layers=[[1, 2], 3]).eval(), []
    distance = model.loss.distance
    model.loss.distance = lambda a, b: seen.append(b) or distance(a, b)
    model(**batch)
    heard = batch["speech"], batch["speech_lengths"]
    (one, two, three), _ = open_teacher(directory, [1, 2, 3])(*heard)
    output, mean, last = seen
    assert torch.allclose(mean, (one + two) / 2, atol=1e-6)
    assert torch.equal(last, three) and torch.equal(output, three)


def test_cached_targets_teach_as_the_teacher_does(make, wave_teacher, tmp_path, batch):
    """Whole utterances: a student that is the teacher has no loss."""
    teacher, directory = wave_teacher()
    # alike long: the GroupNorm of this CNN hears padding
    batch.update(
        speech=batch["speech"][:, :6010], speech_lengths=torch.tensor([6010] * 2)
    )
    opened = open_teacher(directory, [1, 2, 3])
    states, lengths = opened(batch["speech"], batch["speech_lengths"])
    batch.update(targets=torch.stack(states, 2).half().float(), targets_lengths=lengths)
    del opened
    shutil.rmtree(directory)
    path = cached(tmp_path / "targets")
    model = make(path, dict(hidden_size=16, num_hidden_layers=3))
    # float16 holds 11 bits
    assert_a_perfect_student(model, teacher, batch, 1e-6)


@pytest.mark.parametrize("options", [dict(), dict(cnn_init="teacher", freeze_cnn=True)])
def test_refuses_a_teacher_of_another_frame_rate(make, wave_teacher, batch, options):
    """Also where the CNNs have the same weights."""
    half = dict(conv_stride=[5, 2, 2, 2, 2, 2, 4])
    model = make(wave_teacher()[1], half, **options)
    with pytest.raises(UserError, match="frame rates differ"):
        model(**batch)


def test_copies_of_the_model_are_complete(make, wave_teacher, batch):
    """As averaging and export make them, before and after the first step."""
    model = make(wave_teacher()[1], cnn_init="teacher").eval()
    before = copy.deepcopy(model)
    expected = model(**batch)[0]
    assert before(**batch)[0] == expected
    assert copy.deepcopy(model)(**batch)[0] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("freeze_cnn", [True, False])
def test_trains_on_the_gpu_in_half_precision(make, wave_teacher, batch, freeze_cnn):
    options = dict(cnn_init="teacher", freeze_cnn=freeze_cnn)
    model = make(wave_teacher()[1], NO_DROPOUT, **options)
    expected = model.eval()(**batch)[0]
    model = make(wave_teacher()[1], NO_DROPOUT, **options).cuda().train()
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.autocast("cuda", torch.bfloat16):
        loss, _, _ = model(**batch)
    loss.backward()
    assert loss.is_cuda and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    grads = [p.grad for p in model.student.encoder.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


TWIN = dict(hidden_size=16)
FAMILIES = ["hubert", "hubert_stable", "wav2vec2", "unispeech_sat"]


def like(family):
    """Options of a student that has the teacher's kind of layers, and its CNN."""
    student, normalize = {**TWIN, **NO_DROPOUT}, family.endswith("stable")
    if normalize:
        student.update(STABLE)
    return dict(student=student, normalize=normalize)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_begin_as_those_of_the_teacher(make, wave_teacher, batch, family):
    """One slot each, and the rest as it was; inputs come with them."""
    teacher, directory = wave_teacher(family)
    model = make(directory, **like(family), layer_init=[3, 1])
    before = snapshot(model.student)
    model.eval()(**batch)
    found, theirs = snapshot(model.student), snapshot(teacher)
    for slot, layer in enumerate([3, 1]):
        names = [n for n in found if n.startswith(f"encoder.layers.{slot}.")]
        assert len(names) == 16
        for name in names:
            same_name = name.replace(f"layers.{slot}.", f"layers.{layer - 1}.")
            assert torch.equal(found[name], theirs[same_name]), name
    for name in found:
        if name.startswith(("encoder.pos_conv_embed", "feature_projection")):
            assert torch.equal(found[name], theirs[name]), name
        if "layers.2." in name or "layers.3." in name or "feature_extr" in name:
            assert torch.equal(found[name], before[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_layers_is_the_teacher(make, wave_teacher, batch, family):
    teacher, directory = wave_teacher(family)
    options = like(family)
    model = make(directory, **options, layer_init=[1, 2, 3], cnn_init="teacher").eval()
    model.open_teacher("cpu")
    heard = batch["speech"], batch["speech_lengths"]
    expected, lengths = open_teacher(directory, [1, 2])(*heard)
    found = model.hidden_states(*heard)[1:3]
    for a, b in zip(found, expected):
        for i, n in enumerate(lengths.tolist()):
            assert torch.allclose(a[i, :n], b[i, :n], atol=1e-5)


def test_layers_are_those_of_a_teacher_whose_targets_are_cached(
    make, wave_teacher, tmp_path
):
    """Also above the deepest one that is learnt; if the teacher is still there."""
    teacher, directory = wave_teacher()
    path = cached(tmp_path / "targets")
    description = yaml.safe_load((path / "teacher.yaml").read_text())
    description["teacher"] = str(directory)
    (path / "teacher.yaml").write_text(yaml.safe_dump(description))
    options = dict(student=TWIN, layer_init=[3], teacher_layers=[1])
    model = make(path, **options)
    model.open_teacher("cpu")
    assert same(
        snapshot(model.student.encoder.layers[0]), snapshot(teacher.encoder.layers[2])
    )
    shutil.rmtree(directory)
    with pytest.raises(UserError, match=r"layer_init \[3\]: the weights of .*/hubert"):
        make(path, **options).open_teacher("cpu")


def test_a_resumed_run_keeps_the_layers_that_it_trained(make, wave_teacher, batch):
    _, directory = wave_teacher()
    model = make(directory, TWIN, layer_init=[1, 2])
    train(model, batch)
    trained = snapshot(model.student.encoder)
    resumed = make(directory, TWIN, seed=1, layer_init=[1, 2])
    resumed.load_state_dict(model.state_dict())
    resumed.eval()(**batch)
    assert same(snapshot(resumed.student.encoder), trained)


@pytest.mark.parametrize(
    "student, message",
    [
        ({}, "hidden_size is 12, but 16 in the teacher"),
        ({**TWIN, "intermediate_size": 8}, "intermediate_size is 8, but 32"),
        ({**TWIN, "num_attention_heads": 4}, "num_attention_heads is 4, but 2"),
        ({**TWIN, "num_conv_pos_embeddings": 8}, "num_conv_pos_embeddings is 8, but"),
        ({**TWIN, "do_stable_layer_norm": True}, "do_stable_layer_norm is True, but"),
    ],
    ids=str,
)
def test_refuses_layers_of_another_size(make, wave_teacher, batch, student, message):
    model = make(wave_teacher()[1], student, layer_init=[1])
    with pytest.raises(UserError, match=rf"layer_init \[1\]: .*{message}.*leave layer"):
        model(**batch)


def test_refuses_layers_of_another_kind(make, wave_teacher, whisper_teacher, batch):
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    for kind, path in (
        ("wavlm", wave_teacher("wavlm")[1]),
        ("data2vec-audio", wave_teacher("data2vec_audio")[1]),
        ("whisper", whisper_teacher(WhisperEncoder)[1]),
    ):
        with pytest.raises(UserError, match=f"layers of a {kind} model are not those"):
            make(path, TWIN, layer_init=[1])(**batch)
    with pytest.raises(UserError, match=r"has the layers 0 .* to 3 .*not \[4\]"):
        make(wave_teacher()[1], TWIN, layer_init=[4])(**batch)


def test_projections_of_a_new_depth_begin_as_those_before(make):
    second = dict(second_teacher="b", second_layers=[1, 2, 3], second_size=16)
    model = make("a", exits=[1, 2], layer_choice="prefix", **second)
    of = model.exit_losses
    before = snapshot(of["1"]), snapshot(model.loss)
    assert not same(before[0], snapshot(of["2"]))
    model.grown(1, 2)
    assert same(snapshot(of["1"]), before[0]) and same(snapshot(of["2"]), before[0])
    assert same(snapshot(model.loss), before[1])
    model.grown(2, 4)
    assert same(snapshot(model.loss), before[0])
    last = snapshot(model.second_losses["4"])
    assert same(last, snapshot(model.second_losses["1"]))


@pytest.mark.parametrize("options", [{}, dict(exits=[2], layer_choice="prefix")])
def test_two_teachers_are_learnt_at_once(
    make, wave_teacher, whisper_teacher, batch, options
):
    """The loss is the mean of what it is with each of them, at each exit."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    first, other = wave_teacher("wavlm")[1], whisper_teacher(WhisperEncoder)[1]
    second = dict(second_layers=[1, 2, 3], second_size=16)
    both = make(first, second_teacher=str(other), **second, **options).eval()
    loss, stats, _ = both(**batch)
    alone = {}
    for path in (first, other):
        model = make(path, **options).eval()
        states = both.state_dict()
        if path == other:  # its projections, where the first teacher's are
            for name in list(states):
                if name.startswith("second_losses"):
                    depth, rest = name.removeprefix("second_losses.").split(".", 1)
                    own = "loss" if depth == "4" else f"exit_losses.{depth}"
                    states[f"{own}.{rest}"] = states[name]
        own = {k: v for k, v in states.items() if not k.startswith("second_losses")}
        model.load_state_dict(own)
        alone[path] = model(**batch)
    mean = (alone[first][0] + alone[other][0]) / 2
    assert loss.item() == pytest.approx(mean.item(), rel=1e-5)
    assert abs(alone[first][0] - alone[other][0]) > 0.01 * loss
    for name in ("loss_output", "loss_layer1", "loss_layer3"):
        assert stats[name] == pytest.approx(alone[first][1][name].item(), rel=1e-5)
        own = stats[f"second_{name}"]
        assert own == pytest.approx(alone[other][1][name].item(), rel=1e-5)
    losses = train(both, batch, 5)
    assert losses[-1] < losses[0]


def test_refuses_a_second_teacher_of_fewer_layers(make):
    with pytest.raises(UserError, match="list as many as teacher_layers"):
        make("a", second_teacher="b", second_layers=[1, 2], second_size=16)
