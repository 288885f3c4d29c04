#!/usr/bin/env bash
# Common Voice: `./run.sh --lang cy` takes Welsh; `./run.sh --help` lists the options.
# Set $COMMONVOICE to the directory that holds the language's (cy/clips, cy/validated.tsv,
# cy/dev.tsv, cy/test.tsv): the corpus can not be downloaded by a script.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

lang=en
token_type=bpe
previous=
for word in "$@"; do # the sets are named after the language
    if [ "${previous}" == --lang ]; then lang=${word}; fi
    if [[ ${word} == --lang=* ]]; then lang=${word#--lang=}; fi
    previous=${word}
done
case ${lang} in
    zh* | yue | ja | nan*) token_type=char ;; # they have more than 256 characters
esac

../../TEMPLATE/asr1/asr.sh \
    --lang "${lang}" \
    --train_set "train_${lang//-/_}" \
    --valid_set "dev_${lang//-/_}" \
    --test_sets "dev_${lang//-/_} test_${lang//-/_}" \
    --fs 16000 \
    --token_type "${token_type}" \
    --nbpe 256 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --inference_depths "12 10 8 6 4 2" \
    --license cc0-1.0 \
    "$@"
