"""Stage 5: the token list, as ESPnet's asr.sh makes it."""

import io
import logging
from pathlib import Path

from dldkit.data.datadir import read_table, read_text
from dldkit.errors import UserError
from dldkit.step import Step, atomic

BLANK, UNK, SOS_EOS = "<blank>", "<unk>", "<sos/eos>"


def make_token_list(
    token_type: str,
    text: str,
    output: str,
    nlsyms: str | None = None,
    nbpe: int = 256,
    bpe_mode: str = "unigram",
) -> None:
    """Write one token a line: `<blank>`, `<unk>`, the units, `<sos/eos>`.

    A model of BPE is written beside it: sentencepiece's `bpe.model` and `bpe.vocab`. A
    list that was made from the same text in the same way is kept.

    Args:
        token_type: `char`, `word` or `bpe`.
        text: table `utt transcript`.
        nlsyms: file with symbols that are one unit each, one a line.

    Raises:
        UserError: nothing to learn from, or more units asked for than there are.
    """
    sentences = [line for line in read_table(text, allow_empty=True).values() if line]
    if not sentences:
        raise UserError(f"{text} has no transcripts to make tokens from")
    if nlsyms is not None and not Path(nlsyms).is_file():
        raise UserError(f"{nlsyms} (non-linguistic symbols) does not exist")
    symbols = read_text(Path(nlsyms)).split() if nlsyms else []
    directory = Path(output).parent
    files = {"text": text} | ({"nlsyms": nlsyms} if nlsyms else {})
    options = dict(token_type=token_type)
    if token_type == "bpe":
        options.update(vocab_size=nbpe, model_type=bpe_mode, character_coverage=1.0)
    with Step(directory, files, keep=True, **options) as step:
        if step.done and Path(output).is_file():
            return
        if token_type == "bpe":
            del options["token_type"]
            units = _train_bpe(sentences, text, directory, symbols, **options)
            tokens = [BLANK, UNK, *units, SOS_EOS]
            with atomic(output) as new:
                new.write_text("\n".join(tokens) + "\n", encoding="utf-8")
        else:
            with atomic(output) as new:
                _count_units(token_type, text, str(new), nlsyms)
    count = len(Path(output).read_text(encoding="utf-8").splitlines())
    logging.info(f"{output}: {count} tokens ({token_type})")


def _count_units(token_type: str, text: str, output: str, nlsyms: str | None) -> None:
    from espnet2.bin.tokenize_text import tokenize

    tokenize(
        input=text,
        output=output,
        field="2-",
        delimiter=None,
        token_type=token_type,
        space_symbol="<space>",
        non_linguistic_symbols=nlsyms,
        bpemodel=None,
        log_level="INFO",
        write_vocabulary=True,
        vocabulary_size=0,
        remove_non_linguistic_symbols=False,
        cutoff=0,
        add_symbol=[f"{BLANK}:0", f"{UNK}:1", f"{SOS_EOS}:-1"],
        cleaner=None,
        g2p=None,
        add_nonsplit_symbol=[],
    )


def _train_bpe(
    sentences: list[str], text: str, directory: Path, symbols: list[str], **options
) -> list[str]:
    """Train sentencepiece; return its units without its own three special ones."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            user_defined_symbols=symbols,
            minloglevel=1,
            **options,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece can not learn {options['vocab_size']} units (--nbpe) from "
            f"{text}: {error}"
        )
    with atomic(directory / "bpe.model") as new:
        new.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    with open(directory / "bpe.vocab", "w", encoding="utf-8") as vocab:
        scores = (processor.get_score(i) for i in range(len(pieces)))
        vocab.writelines(f"{p}\t{s:g}\n" for p, s in zip(pieces, scores))
    return pieces[3:]  # <unk>, <s>, </s>
