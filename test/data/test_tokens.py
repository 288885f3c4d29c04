import pytest
import sentencepiece
from espnet2.bin.tokenize_text import main as espnet_main
from espnet2.text.build_tokenizer import build_tokenizer
from espnet2.text.token_id_converter import TokenIDConverter

from dldkit.bin.make_token_list import main
from dldkit.data.datadir import read_table, write_table


@pytest.fixture
def text(an4, tmp_path):
    """The transcripts of all eight recordings, and one symbol of no language."""
    table = {"x-noise": "<noise> YES", "x-empty": ""}
    for name in ("train_nodev", "train_dev", "test"):
        table.update(read_table(an4 / name / "text"))
    write_table(tmp_path / "text", table)
    (tmp_path / "nlsyms").write_text("<noise>\n")
    return tmp_path / "text"


@pytest.mark.parametrize("token_type", ["char", "word"])
def test_is_what_espnet_makes(text, tmp_path, token_type):
    options = f"--token_type {token_type}".split()
    # As ESPnet's asr.sh calls it.
    espnet = (
        f"--input {text} --output {tmp_path}/espnet.txt --field 2- "
        f"--write_vocabulary true --non_linguistic_symbols {tmp_path}/nlsyms "
        "--add_symbol <blank>:0 --add_symbol <unk>:1 --add_symbol <sos/eos>:-1"
    )
    ours = f"--text {text} --output {tmp_path}/ours.txt --nlsyms {tmp_path}/nlsyms"
    espnet_main(espnet.split() + options)
    main(ours.split() + options)
    ours = (tmp_path / "ours.txt").read_text()
    assert ours == (tmp_path / "espnet.txt").read_text()
    tokens = ours.splitlines()
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>"
    assert "<noise>" in tokens
    assert ("SEVEN" in tokens) == (token_type == "word")


@pytest.mark.parametrize("mode", ["unigram", "bpe"])
def test_bpe_round_trip_through_espnet(text, tmp_path, mode):
    out = tmp_path / "out"
    main(
        f"--token_type bpe --nbpe 40 --bpe_mode {mode} --text {text} "
        f"--nlsyms {tmp_path}/nlsyms --output {out}/tokens.txt".split()
    )
    tokens = (out / "tokens.txt").read_text().splitlines()
    # sentencepiece's own <unk> <s> </s> give way to <blank> <unk> and <sos/eos>.
    assert len(tokens) == len(set(tokens)) == 40
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>"
    assert "<noise>" in tokens
    tokenizer = build_tokenizer("bpe", bpemodel=str(out / "bpe.model"))
    ids = TokenIDConverter(token_list=str(out / "tokens.txt"))
    unknown = tokens.index("<unk>")
    for sentence in filter(None, read_table(text, allow_empty=True).values()):
        numbers = ids.tokens2ids(tokenizer.text2tokens(sentence))
        assert unknown not in numbers
        assert tokenizer.tokens2text(ids.ids2tokens(numbers)) == sentence


def test_a_list_is_kept_until_text_or_options_change(text, tmp_path):
    output = tmp_path / "out" / "tokens.txt"

    def made(*options):
        main(["--text", str(text), "--output", str(output), *options])
        return output.stat().st_mtime_ns, len(output.read_text().splitlines())

    first = made("--nbpe", "40")
    text.touch()
    assert made("--nbpe", "40") == first
    assert made("--nbpe", "42")[1] == 42
    before = output.read_text()
    write_table(text, {**read_table(text, allow_empty=True), "new": "XYLOPHONES ZAP"})
    made("--nbpe", "42")
    assert output.read_text() != before


def test_bpe_model_is_that_of_sentencepiece_on_the_text(text, tmp_path):
    """ESPnet trains on a file with the transcripts; so does this."""
    sentences = [s for s in read_table(text, allow_empty=True).values() if s]
    (tmp_path / "input").write_text("\n".join(sentences) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "input"),
        vocab_size=40,
        model_type="unigram",
        model_prefix=str(tmp_path / "espnet"),
        character_coverage=1.0,
        minloglevel=2,
    )
    main(f"--nbpe 40 --text {text} --output {tmp_path}/tokens.txt".split())

    def pieces(name):
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        return [line.split("\t")[0] for line in lines]

    assert pieces("bpe.vocab") == pieces("espnet.vocab")
    assert pieces("tokens.txt")[2:-1] == pieces("espnet.vocab")[3:]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--nbpe 9999", "can not learn 9999 units"),
        ("--text /nowhere/text", "/nowhere/text does not exist"),
        ("--nlsyms /nowhere/nlsyms", "/nowhere/nlsyms"),
    ],
)
def test_refusals(text, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        main(f"--text {text} --output {tmp_path}/tokens.txt {options}".split())
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("token_type", ["char", "bpe"])
def test_symbols_in_another_encoding_are_refused(text, tmp_path, capsys, token_type):
    (tmp_path / "latin").write_text("<b\xe4m>\n", encoding="latin1")
    options = f"--nlsyms {tmp_path}/latin --nbpe 40 --token_type {token_type}"
    with pytest.raises(SystemExit):
        main(f"--text {text} --output {tmp_path}/tokens.txt {options}".split())
    assert "latin is not UTF-8" in capsys.readouterr().err.splitlines()[-1]


def test_no_transcripts_are_refused(tmp_path, capsys):
    write_table(tmp_path / "text", {"a": "", "b": ""})
    with pytest.raises(SystemExit):
        main(f"--text {tmp_path}/text --output {tmp_path}/tokens.txt".split())
    assert "no transcripts" in capsys.readouterr().err
