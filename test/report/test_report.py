import json
import re
import tarfile
from pathlib import Path

import espnet2
import kaldiio
import numpy as np
import pytest
import soundfile
import torch

from dldkit.bin.depth_report import main
from dldkit.errors import UserError
from dldkit.report import plot, results, tables
from dldkit.report.report import render
from dldkit.report.scoring import Score, read_text
from dldkit.step import digest

SOURCE = "AN4, real recordings"
MODEL = "valid.loss.ave.pth"
FBANK = "--frontend_conf n_fft=512 --frontend_conf hop_length=160"


def write_table(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} {value}\n" for key, value in table.items()))


def make_result(system="dld", depth=2, errors=(1, 0), test_set="test", inserted=1):
    words = Score(
        ("u1", "u2"),
        np.array([4, 2]) - errors,
        np.array(errors),
        np.array([0, 0]),
        np.array([inserted, 0]),
    )
    return results.Result(
        system, test_set, depth, words, words, (0.1, 0.5), layers=tuple(range(depth))
    )


def cells(table):
    """Rows of a Markdown table without the line under its header."""
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in row] for row in (rows[0], *rows[2:])]


@pytest.fixture
def decoded(tmp_path):
    """Hand-made texts: one edit at depth 4, two at depth 2, of four words."""
    write_table(tmp_path / "dump/test/text", {"u1": "one two three", "u2": "four"})
    for depth, u1, u2 in ((4, "one too three", "four"), (2, "one too", "four")):
        texts = {"u1": u1, "u2": u2}
        write_table(tmp_path / f"exp/dld/tag/depth{depth}/test/text", texts)
    return tmp_path


def collect(root, depths=(4, 2)):
    systems = {"dld": root / "exp/dld"}
    return results.collect_scores(systems, root / "dump", ["test"], depths, "tag", 0)


def test_scores_of_each_decoded_depth(decoded):
    four, two = collect(decoded)
    assert (four.depth, four.words.error_rate) == (4, 1 / 4)
    assert (two.depth, two.words.error_rate) == (2, 2 / 4)
    assert four.characters.totals()["err"] == 1
    assert four.interval[0] <= 1 / 4 <= four.interval[1]


@pytest.mark.parametrize("name", ["depth2", "threshold0.5"])
def test_text_of_an_older_model_is_refused(decoded, name):
    """Of a depth, and of early stopping."""
    exp = decoded / "exp/dld"
    (exp / "model.pth").write_text("new")
    thresholds = exp / "tag/exit_thresholds/thresholds.json"
    thresholds.parent.mkdir()
    thresholds.write_text("[0.5]")
    done = exp / "tag" / name / "test" / ".done"
    done.parent.mkdir(parents=True, exist_ok=True)

    def check(*model):
        files = {"asr_model_file": found for found in model}
        done.write_text(json.dumps({"files": files}))
        results.refuse_older(exp, "tag", "model.pth", ["test"], [4, 2])

    check()
    check(digest(exp / "model.pth"))
    with pytest.raises(UserError, match=f"{name}/test/text is of another model .*12"):
        check("of another one")


def test_what_was_not_decoded_counts_as_deletions_and_is_listed(decoded):
    """One recording was dropped in stage 3, another is too short for the encoder."""
    data, exp = decoded / "dump/test", decoded / "exp/dld/tag/depth4/test"
    write_table(data / "dropped.txt", {"u3": "no such file: u3.wav", "u4": "empty"})
    write_table(data / "dropped_text", {"u3": "five six"})
    write_table(exp / "text", {"u1": "one two three", "u2": ""})
    write_table(exp / "score", {"u1": "-1.5", "u2": "0.0"})
    (four,) = collect(decoded, depths=[4])
    totals = four.words.totals()
    assert (totals["wrd"], totals["corr"], totals["del"]) == (6, 3, 3)
    assert four.not_decoded == {
        "u2": "too short for the encoder",
        "u3": "no such file: u3.wav",
    }
    assert tables.not_decoded_lines([four]) == (
        "- dld, test, depth 4: u2 (too short for the encoder), "
        "u3 (no such file: u3.wav)"
    )
    assert four.as_json()["not_decoded"] == four.not_decoded
    facts = dict(command="", environment={}, test_sets={"test": SOURCE}, notes=[])
    facts.update(systems={}, inference_tag="tag")
    assert "## Not decoded, counted as deletions\n\n- dld" in render([four], [], facts)
    four.not_decoded = {}
    assert "Not decoded" not in render([four], [], facts)
    # as beam search writes it, for what it heard nothing in
    write_table(exp / "score", {"u1": "tensor(-1.5)", "u2": "tensor(-2.5)"})
    assert list(collect(decoded, depths=[4])[0].not_decoded) == ["u3"]


def test_of_a_validation_set_all_of_it_is_scored(decoded):
    """Stage 4 left out u2, and stage 3 dropped u3."""
    dump = decoded / "dump"
    (dump / "org").mkdir()
    (dump / "test").rename(dump / "org" / "test")
    write_table(dump / "org/test/dropped.txt", {"u3": "no samples"})
    write_table(dump / "org/test/dropped_text", {"u3": "five"})
    write_table(dump / "test/text", {"u1": "one two three"})
    four, _ = collect(decoded)
    totals = four.words.totals()
    assert (totals["wrd"], totals["del"]) == (5, 1)
    assert four.not_decoded == {"u3": "no samples"}


@pytest.fixture
def stopped(decoded):
    """The same with early stopping: one edit at a mean depth of 3, two at 2."""
    tag = decoded / "exp/dld/tag"
    (tag / "exit_thresholds").mkdir()
    (tag / "exit_thresholds/thresholds.json").write_text("[0.125, 0.5]")
    for threshold, u1, depths in ((0.125, "one too three", "42"), (0.5, "one", "22")):
        found = tag / f"threshold{threshold}/test"
        write_table(found / "text", {"u1": u1, "u2": "four"})
        write_table(found / "depth", dict(zip(("u1", "u2"), depths)))
    write_table(tag / "threshold0.9/test/text", {"u1": "of an earlier run"})
    return results.collect_stopped(
        {"dld": decoded / "exp/dld"}, decoded / "dump", ["test"], "tag", 0
    )


def test_early_stopping_is_scored_at_its_mean_depth(stopped):
    unsure, sure = stopped
    assert (unsure.threshold, unsure.depth, unsure.depths) == (0.125, 3, [4, 2])
    assert (unsure.words.error_rate, sure.words.error_rate) == (1 / 4, 2 / 4)
    unsure.macs_per_second = 5e6
    header, row, _ = cells(tables.stopping_table(stopped))
    low, high = (100 * bound for bound in unsure.interval)
    assert dict(zip(header, row)) == {
        "early stopping": "dld",
        "test set": "test",
        "threshold": "0.125",
        "mean depth": "3.0",
        "WER % [95 % CI]": f"25.00 [{low:.2f}, {high:.2f}]",
        "CER %": row[5],
        "MMACs/s": "5.0",
        "RTF median (min-max)": "-",
    }
    facts = dict(command="", environment={}, test_sets={"test": SOURCE}, notes=[])
    facts.update(systems={"dld": dict(experiment="exp", model="m")})
    text = render([], stopped, {**facts, "inference_tag": "tag"})
    assert "## Early stopping\n\n| early stopping" in text
    assert text.count("| tag/threshold0.125/test |") == 2  # WER and CER
    assert "Early stopping" not in render([], [], {**facts, "inference_tag": "tag"})


def test_a_depth_that_was_not_decoded_is_left_out(decoded, caplog):
    assert [r.depth for r in collect(decoded, depths=[6, 4, 3])] == [4]
    assert "nothing is decoded at depth 6 3: left out" in caplog.text
    with pytest.raises(UserError, match="system dld: nothing is decoded on test"):
        collect(decoded, depths=[6])


def test_an_unfinished_decoding_is_refused(decoded):
    text = decoded / "exp/dld/tag/depth2/test/text"
    text.write_text("u2 four\n")
    with pytest.raises(UserError, match=re.escape(f"{text}: no hypothesis for 1")):
        collect(decoded)


def test_tables_have_espnets_columns_and_percentages():
    table = cells(tables.espnet_table([make_result()], "words", "tag"))
    assert table[0] == "dataset Snt Wrd Corr Sub Del Ins Err S.Err".split()
    # 6 words: 5 correct, 1 substituted, 1 inserted; 1 of 2 sentences wrong
    expected = "tag/depth2/test 2 6 83.3 16.7 0.0 16.7 33.3 50.0"
    assert table[1] == expected.split()


def test_summary_shows_what_was_measured():
    result = make_result()
    result.parameters = 1234567
    result.macs_per_second = 12.34e6
    result.rtf = [0.03, 0.01, 0.02]
    header, row = cells(tables.summary_table([result]))
    assert dict(zip(header, row)) == {
        "system": "dld",
        "test set": "test",
        "depth": "2",
        "layers": "0,1",
        "WER % [95 % CI]": "33.33 [10.00, 50.00]",
        "CER %": "33.33",
        "params": "1,234,567",
        "MMACs/s": "12.3",
        "RTF median (min-max)": "0.0200 (0.0100-0.0300)",
    }


@pytest.mark.parametrize(
    "layers, shown",
    [((0, 1, 2, 3), "0-3"), ((0, 1, 3), "0,1,3"), ((0, 4, 5, 6, 9), "0,4-6,9")],
)
def test_layers_are_written_shortly(layers, shown):
    assert tables._slots(layers) == shown


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    return drawn


@pytest.mark.parametrize(
    "errors, scale", [((0, 0, 1), "symlog"), ((1, 1, 0), "linear")]
)
def test_plot_of_a_perfect_and_a_hopeless_system(tmp_path, figures, errors, scale):
    """WERs of 0 and of 100 % are both inside the axes."""
    found = [
        make_result("dld", 4, (errors[0], 0), inserted=0),
        make_result("dld", 2, (errors[1], 0), inserted=0),
        make_result("static", 4, (4, errors[2])),
    ]
    plot.plot(found, {"test": SOURCE}, tmp_path / "plot.png")
    assert figures[0].axes[0].get_yscale() == scale
    for panel in figures[0].axes:
        low, high = panel.get_ylim()
        rates = [100 * result.words.error_rate for result in found]
        assert low <= min(rates) and max(rates) <= high
    from matplotlib import image

    colours = image.imread(tmp_path / "plot.png")[..., :3].reshape(-1, 3)
    blue, orange = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)  # matplotlib's first two
    for colour in (blue, orange):
        distance = np.abs(colours - np.array(colour) / 255).max(1)
        assert (distance < 0.01).sum() > 50


def test_plot_draws_one_line_per_system_with_its_intervals(tmp_path, figures):
    found = [make_result("dld", 2), make_result("dld", 4), make_result("static", 4)]
    for result, macs in zip(found, (2e6, 4e6, 5e6)):
        result.macs_per_second = macs
    plot.plot(found, {"test": SOURCE}, tmp_path / "plot.png")
    by_depth, by_macs = figures[0].axes
    for panel, x in ((by_depth, [[2, 4], [4]]), (by_macs, [[2, 4], [5]])):
        lines = panel.containers
        assert [line.get_label() for line in lines] == ["dld", "static"]
        for line, expected in zip(lines, x):
            points = line.lines[0]
            assert points.get_xdata().tolist() == expected
            assert points.get_ydata() == pytest.approx([100 / 3] * len(expected))
            (bars,) = line.lines[2]
            for segment in bars.get_segments():
                assert segment[:, 1] == pytest.approx([10, 50])
    assert SOURCE in by_macs.get_title(loc="right")


def test_plot_draws_early_stopping_against_mean_depth(tmp_path, figures, stopped):
    plot.plot(
        [make_result("dld", 2), make_result("dld", 4), *stopped],
        {"test": SOURCE},
        tmp_path / "plot.png",
    )
    fixed, early = figures[0].axes[0].containers
    assert [fixed.get_label(), early.get_label()] == ["dld", "dld, early stopping"]
    assert early.lines[0].get_xdata().tolist() == [2, 3]
    assert early.lines[0].get_ydata().tolist() == [50, 25]
    colours = {line.lines[0].get_color() for line in (fixed, early)}
    assert len(colours) == 1
    assert figures[0].axes[0].get_xticks().tolist() == [2, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--system", "exp/asr"], "write NAME=PATH"),
        (["--system", "a=x", "--system", "a=y"], "name a stands there twice"),
        (["--system", "a=x", "--test_sets", " "], "at least one test set"),
        (["--system", "a=x", "--rtf_utts", "-1"], "can not be less than 0"),
        (["--system", "a=x"], "system a: nothing is decoded on test; looked for x/"),
    ],
)
def test_wrong_options_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(
            ["--data_root", str(tmp_path), "--test_sets", "test", "--depths", "2"]
            + ["--inference_tag", "tag", "--inference_asr_model", MODEL]
            + ["--output_dir", str(tmp_path), *options]
        )
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_depths_are_read_as_everywhere(capsys):
    with pytest.raises(SystemExit):
        main(["--system", "a=x", "--depths", "12 six"])
    assert "write numbers of layers" in capsys.readouterr().err


def test_missing_model_is_named(decoded):
    with pytest.raises(UserError, match="system dld: .*config.yaml does not exist"):
        results.load_recognisers({"dld": decoded / "exp/dld"}, MODEL, None, "auto")


# --- the whole report, from models, recordings and decoded texts


def prepare_an4(directory):
    """Two of the real recordings that come with ESPnet, as a formatted test set."""
    archive = Path(espnet2.__file__).parents[1] / "egs3/mini_an4/esp2_asr"
    texts = {"cen8-fcaw-b": "R E W Y Z", "cen8-mmxg-b": "E N T E R TWO"}
    wavs = {}
    directory.mkdir(parents=True)
    with tarfile.open(archive / "downloads.tar.gz") as tar:
        for member in tar.getmembers():
            utt_id = Path(member.name).stem
            if utt_id in texts:
                samples, rate = soundfile.read(tar.extractfile(member), dtype="int16")
                assert rate == 16000
                wavs[utt_id] = directory / f"{utt_id}.flac"
                soundfile.write(wavs[utt_id], samples, rate)
    write_table(directory / "wav.scp", wavs)
    write_table(directory / "text", texts)
    (directory / "corpus_source").write_text(SOURCE + "\n")
    return wavs


def make_experiment(exp, num_blocks, input_options, **encoder_conf):
    """Write config.yaml as training does, and an untrained model beside it."""
    from dldkit.tasks.asr import DLDASRTask

    tokens = ["<blank>", "<unk>", "<space>", *"ENRTWOYZ", "<sos/eos>"]
    exp.mkdir(parents=True)
    (exp / "tokens.txt").write_text("\n".join(tokens) + "\n")
    conf = dict(output_size=16, attention_heads=2, linear_units=32)
    conf.update(num_blocks=num_blocks, cnn_module_kernel=7, **encoder_conf)
    options = f"""--output_dir {exp} --dry_run true --token_type char
        --token_list {exp}/tokens.txt --normalize none --encoder ld_conformer
        --model_conf ctc_weight=1.0 {input_options}""".split()
    for key, value in conf.items():
        options += ["--encoder_conf", f"{key}={value}"]
    DLDASRTask.main(cmd=options)
    torch.manual_seed(0)
    model, _ = DLDASRTask.build_model_from_file(exp / "config.yaml", None)
    torch.save(model.state_dict(), exp / MODEL)


def decode(exp, depth, wavs):
    from dldkit.asr.inference import Speech2Text

    recogniser = Speech2Text(exp / "config.yaml", exp / MODEL, depth=depth)
    texts = {u: recogniser(soundfile.read(w)[0])[0][0] for u, w in wavs.items()}
    write_table(exp / f"greedy/depth{depth}/an4/text", texts)


def stop_early(exp, wavs):
    """As if one utterance was sure at the first exit, and the other one never."""
    tag = exp / "greedy"
    (tag / "exit_thresholds").mkdir()
    (tag / "exit_thresholds/thresholds.json").write_text("[0.5]")
    write_table(tag / "threshold0.5/an4/text", dict.fromkeys(wavs, "N E"))
    write_table(tag / "threshold0.5/an4/depth", dict(zip(wavs, "14")))


@pytest.mark.integration
def test_report_of_real_decoding(tmp_path, capsys):
    wavs = prepare_an4(tmp_path / "dump/raw/an4")
    make_experiment(*(tmp_path / "dld", 4, FBANK), layer_choice="prefix", exits="[1,2]")
    make_experiment(tmp_path / "static", 3, FBANK, depth_sampler="full")
    for system, depths in (("dld", (4, 2, 1)), ("static", (3,))):
        for depth in depths:
            decode(tmp_path / system, depth, wavs)
    stop_early(tmp_path / "dld", wavs)
    output = tmp_path / "report"
    main(
        ["--system", f"static={tmp_path}/static", f"dld={tmp_path}/dld"]
        + ["--data_root", str(tmp_path / "dump/raw"), "--test_sets", "an4"]
        + ["--depths", "4 3 2 1", "--inference_tag", "greedy"]
        + ["--inference_asr_model", MODEL, "--output_dir", str(output)]
        + ["--rtf_utts", "2"]
    )
    printed = capsys.readouterr().out

    found = json.loads((output / "results.json").read_text())
    assert found["test_sets"] == {"an4": SOURCE}
    assert found["environment"]["torch"] == torch.__version__.split("+")[0]
    assert "--inference_tag greedy" in found["command"]
    rows = {(r["system"], r["depth"]): r for r in found["results"]}
    assert list(rows) == [("static", 3), ("dld", 4), ("dld", 2), ("dld", 1)]
    assert rows["dld", 2]["layers"] == [0, 1]
    for field in ("parameters", "macs_per_second"):
        one, two, four = (rows["dld", depth][field] for depth in (1, 2, 4))
        assert one < two < four
        # every layer costs the same, and the static model's layers as much
        assert four - two == pytest.approx(2 * (two - one))
        assert rows["static", 3][field] == pytest.approx(2 * two - one)

    state = torch.load(tmp_path / "dld" / MODEL)
    sizes = {k: v.numel() for k, v in state.items() if re.match("encoder|ctc", k)}
    sizes = {k: n for k, n in sizes.items() if not re.search("running|tracked", k)}
    assert rows["dld", 4]["parameters"] == sum(sizes.values())
    skipped = sum(
        n for k, n in sizes.items() if re.match(r"encoder.encoders.[23]\.", k)
    )
    assert rows["dld", 2]["parameters"] == sum(sizes.values()) - skipped

    for (system, depth), row in rows.items():
        hyps = read_text(tmp_path / system / f"greedy/depth{depth}/an4/text")
        words = row["words"]
        assert words["wrd"] == 11 and words["snt"] == 2
        said = words["corr"] + words["sub"] + words["ins"]
        assert said == sum(len(text.split()) for text in hyps.values())
        assert row["wer"] == pytest.approx(100 * words["err"] / 11)
        assert row["wer_interval"][0] <= row["wer"] <= row["wer_interval"][1]
        assert len(row["rtf"]) == 5 and 0 < min(row["rtf"]) <= row["rtf_median"] < 5

    (early,) = found["early_stopping"]
    assert (early["threshold"], early["depth"], len(early["rtf"])) == (0.5, 2.5, 5)
    one, four = (rows["dld", depth]["macs_per_second"] for depth in (1, 4))
    # beside the layers, the first of them passed the output layers of two exits
    assert 1 < early["macs_per_second"] / ((one + four) / 2) < 1.05

    text = (output / "RESULTS.md").read_text()
    assert f"an4: speech: {SOURCE}" in text
    assert found["command"] in text and found["environment"]["cpu"] in text
    speech, table, stopping, written = printed.split("\n\n")
    assert speech == f"- an4: speech: {SOURCE}"
    assert f"{speech}\n\n{table}\n\n" in text
    assert cells(stopping)[1][:4] == ["dld", "an4", "0.5", "2.5"]
    assert f"## Early stopping\n\n{stopping}\n\n" in text
    assert written == f"written: {output}/RESULTS.md\n"
    assert [(row[0], int(row[2])) for row in cells(table)[1:]] == list(rows)
    for _, depth in rows:
        assert text.count(f"| greedy/depth{depth}/an4 ") == 2  # WER and CER
    from matplotlib import image

    height, width, _ = image.imread(output / "wer_vs_depth.png").shape
    assert width > height > 300


@pytest.mark.integration
def test_costs_on_features(tmp_path):
    wavs = prepare_an4(tmp_path / "wavs")
    feats = {}
    for utt_id, path in wavs.items():
        samples = soundfile.read(path, dtype="float32")[0]
        blocks = samples[: len(samples) // 320 * 320].reshape(-1, 320)  # 20 ms
        feats[utt_id] = np.log1p(np.abs(np.fft.rfft(blocks))[:, :24]).astype("float32")
    data_dir = tmp_path / "dump/test"
    write_table(data_dir / "feats_shape", {u: f"{len(f)},24" for u, f in feats.items()})
    ark, scp = str(data_dir / "feats.ark"), str(data_dir / "feats.scp")
    kaldiio.save_ark(ark, feats, scp=scp)
    make_experiment(tmp_path / "dld", 4, "--input_size 24")
    found = [make_result("dld", depth) for depth in (4, 2)]
    systems = {"dld": tmp_path / "dld"}
    recognisers = results.load_recognisers(systems, MODEL, None, "auto")
    results.measure_costs(found, recognisers, tmp_path / "dump", 0.02, 2)
    four, two = found
    assert (four.layers, two.layers) == ((0, 1, 2, 3), (0, 3))
    assert [len(r.rtf) for r in found] == [5, 5]
    assert two.macs_per_second < four.macs_per_second

    per_second = four.macs_per_second
    results.measure_costs([four], recognisers, tmp_path / "dump", 0.01, 0)
    assert four.macs_per_second == pytest.approx(2 * per_second)  # half as long
    assert len(four.rtf) == 5  # left as it was: none was asked for
