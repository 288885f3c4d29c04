#!/usr/bin/env bash
# Train a reference model and a student of variable depth; report WER at every depth.
#
#   cd egs2/<corpus>/asr1 && ./run.sh [--option value]...
#
# Stages:
#    1 data preparation              6 statistics for the reference   11 student training
#    2 speed perturbation            7 reference training             12 decoding at each depth
#    3 format, features              8 reference decoding             13 scores, depth report
#    4 length filter                 9 reference's cached posteriors  14 pack
#    5 token list                   10 statistics for the student     15 upload
# Every stage may be run again: what is finished is kept, and a training goes on where
# it stopped.
set -euo pipefail
SECONDS=0

## General
stage=1  # first stage to run
stop_stage=15  # last stage to run
skip_data_prep=false  # skip stages 1-5
skip_reference=false  # skip stages 6-9
skip_train=false  # skip stages 6, 7 and 9-11
skip_eval=false  # skip stages 8, 12 and 13
skip_packing=false  # skip stage 14
skip_upload=false  # skip stage 15
ngpu=auto  # GPUs per node for training; auto: 1 if there is one, else 0 (CPU)
num_nodes=1  # nodes for training; more than 1 goes through ESPnet's launcher
launch_args=  # options of espnet2.bin.launch, e.g. "--cmd slurm.pl" or "--host node1,node2"
num_threads=2  # threads of a training on the CPU
nj=2  # parallel jobs for data and posteriors
inference_nj=2  # parallel jobs for decoding
parallel_config=  # YAML file of a cluster for these jobs: env: slurm, n_workers: 8, options: {}
python=python3  # the Python to run everything with
dumpdir=dump  # directory for formatted data
expdir=exp  # directory for experiments

## Data
train_set=train  # training set: a directory in data/
valid_set=dev  # validation set
test_sets=  # test sets, separated by spaces
local_data_opts=  # options for local/data.sh
lang=en  # language, for the model card
speed_perturb_factors=  # e.g. "0.9 1.0 1.1"; empty: no speed perturbation
feats_type=raw  # raw (audio), fbank, or extracted (your own feats.scp in data/*/)
audio_format=flac  # flac or wav, for raw
fs=16000  # sampling rate in Hz; other audio is resampled
n_mels=80  # dimension of fbank
frame_shift=0.01  # seconds between the frames of fbank and extracted
min_wav_duration=0.1  # shorter training and validation utterances are left out (seconds)
max_wav_duration=20  # longer ones too (seconds)

## Tokens
token_type=bpe  # char, bpe or word
nbpe=256  # number of BPE units
bpe_mode=unigram  # unigram or bpe
bpe_train_text=  # text to train BPE on; empty: the training set's
nlsyms_txt=none  # file of symbols that stay one token each

## Reference model
reference_config=  # training config; empty: that of --asr_config
reference_args=  # more options of asr_train for the reference, e.g. "--max_epoch 20"
reference_tag=  # suffix of its experiment directory; empty: made from the settings
kd_source=live  # live (the reference runs beside the student) or cached (stage 9)
top_k=  # keep K tokens per frame in cached posteriors; empty: all

## Student model
system=dld  # what to train: a file of conf/systems (static rd dld early_exit stochastic_depth)
asr_config=conf/train_asr.yaml  # training config; that of --system is merged over it
asr_args=  # more options of asr_train, e.g. "--max_epoch 20 --model_conf kd_weight=0.5"
asr_tag=  # suffix of its experiment directory; empty: made from the settings
seed=  # seed of both trainings; empty: that of the config
feats_normalize=global_mvn  # global_mvn, utterance_mvn or none

## Inference
inference_asr_model=valid.loss_ctc.ave.pth  # checkpoint to decode with
inference_depths="12 10 8 6 4 2"  # numbers of encoder layers to decode with
inference_args=  # more options of asr_inference, e.g. "--beam_size 10"; default: greedy CTC
inference_tag=  # name of the decoding directory; empty: made from the settings
selector=  # which layers a depth means: even or prefix; empty: prefix for early_exit, else even
use_depth_profile=true  # re-estimate BatchNorm statistics for each depth before decoding
calibration_utts=300  # training utterances to do that on
rtf_utts=20  # utterances to measure the real-time factor on; 0: do not measure

## Packing
hf_repo=  # Hugging Face repository (user/name) to push to; empty: only prepare the directory

template=$(dirname "$(readlink -f "$0")")
# shellcheck source=options.sh
. "${template}/options.sh" "$@"
# shellcheck source=path.sh
. ./path.sh
# shellcheck source=functions.sh
. "${template}/functions.sh"

#
# What follows from the options
#
[ -n "${test_sets}" ] || die "--test_sets is empty: name at least one directory of data/"
systems="${template%/egs2/*}/conf/systems"
require_system "${system}" "${systems}"
if [ -z "${selector}" ]; then
    selector=even
    if [ "${system}" == early_exit ]; then selector=prefix; fi
fi

unperturbed_set=${train_set}
sp=
if [ -n "${speed_perturb_factors}" ]; then
    sp=_sp
    train_set=${train_set}_sp
fi
data_feats=${dumpdir}/${feats_type}
case ${feats_type} in
    raw)
        scp=wav.scp
        data_type=sound
        speech_fold_length=80000 # samples
        min_length=${min_wav_duration}
        max_length=${max_wav_duration}
        ;;
    fbank | extracted)
        scp=feats.scp
        data_type=kaldi_ark
        speech_fold_length=800 # frames
        min_length=$(awk "BEGIN { print ${min_wav_duration} / ${frame_shift} }")
        max_length=$(awk "BEGIN { print ${max_wav_duration} / ${frame_shift} }")
        ;;
    *) die "--feats_type ${feats_type}: choose raw, fbank or extracted" ;;
esac

tokens=${token_type}
bpemodel=none
if [ "${token_type}" == bpe ]; then tokens=bpe_${bpe_mode}${nbpe}; fi
token_dir=data/token_list/${tokens}
if [ "${token_type}" == bpe ]; then bpemodel=${token_dir}/bpe.model; fi
token_list=${token_dir}/tokens.txt

suffix=${sp}${seed:+_seed${seed}}
reference_config=${reference_config:-${asr_config}}
reference_tag=${reference_tag:-static$(tag_of "${reference_config}" train_asr "${reference_args}")${suffix}}
reference_exp=${expdir}/asr_${reference_tag}
if [ -z "${asr_tag}" ]; then
    asr_tag=${system}$(tag_of "${asr_config}" train_asr "${asr_args}")${suffix}
    if [ "${kd_source}" == cached ]; then asr_tag+=_cached; fi
fi
asr_exp=${expdir}/asr_${asr_tag}
case ${kd_source} in
    live) reference=${reference_exp}/${inference_asr_model} ;;
    cached) reference=${reference_exp}/posteriors ;;
    *) die "--kd_source ${kd_source}: choose live or cached" ;;
esac

# Statistics depend on the data and the frontend only, so that systems share them.
asr_stats_dir=${expdir}/asr_stats_${feats_type}_${tokens}${sp}
reference_stats_dir=${asr_stats_dir}
if [ "${reference_config}" != "${asr_config}" ] || [[ ${reference_args} == *--frontend* ]]
then
    reference_stats_dir=${asr_stats_dir}_${reference_tag}
fi

depth_profile=auto
if ! "${use_depth_profile}"; then depth_profile=none; fi
if [ -z "${inference_tag}" ]; then
    inference_tag=decode_${inference_asr_model%.pth}
    inference_tag+=$(echo "${inference_args}" | sed -e 's/--/_/g' -e 's/[ |=/]//g')
    if [ "${selector}" != even ]; then inference_tag+=_${selector}; fi
    if ! "${use_depth_profile}"; then inference_tag+=_uncalibrated; fi
fi

mapfile -t reference_options < <(words "${reference_args} ${seed:+--seed ${seed}}")
mapfile -t asr_options < <(words "${asr_args} ${seed:+--seed ${seed}}")
parallel_options=()
if [ -n "${parallel_config}" ]; then
    parallel_options=(--parallel_config "${parallel_config}")
fi

#
# Steps that the reference and the student share
#
set_data_options() { # data_options: what asr_train has to know of the data
    local set
    stage_needs "${token_list}" "stage 5"
    data_options=(
        --use_preprocessor true
        --token_type "${token_type}"
        --token_list "${token_list}"
        --bpemodel "${bpemodel}"
        --non_linguistic_symbols "${nlsyms_txt}"
        --cleaner none
        --g2p none
    )
    for set in train valid; do
        local dir=${data_feats}/${train_set}
        if [ "${set}" == valid ]; then dir=${data_feats}/${valid_set}; fi
        stage_needs "${dir}/${scp}" "stages 3 and 4"
        data_options+=(
            "--${set}_data_path_and_name_and_type" "${dir}/${scp},speech,${data_type}"
            "--${set}_data_path_and_name_and_type" "${dir}/text,text,text"
        )
    done
    if [ "${feats_type}" == raw ]; then
        data_options+=(--frontend_conf "fs=${fs}")
    else
        data_options+=(--input_size "$(<"${data_feats}/${train_set}/feats_dim")")
    fi
}

collect_stats() { # collect_stats DIR EXP [options of asr_train]...
    local dir=$1 exp=$2 key set
    shift 2
    set_data_options
    key=$({
        "${python}" -m dldkit.bin.merge_config "${exp}/train.yaml" \
            --select frontend frontend_conf
        if [[ $* == *--frontend* ]]; then echo "$*"; fi
        echo "${data_options[*]}"
        cat "${token_list}" "${data_feats}/${train_set}"/{"${scp}",text} \
            "${data_feats}/${valid_set}"/{"${scp}",text}
        cat "${data_feats}/${train_set}"/utt2num_samples 2>/dev/null || true
    } | fingerprint)
    if is_done "${dir}" "${key}"; then
        log "${dir} is up to date"
        return
    fi
    log "Collecting statistics, log: ${dir}/stats.log"
    mkdir -p "${dir}"
    rm -f "${dir}/.done"
    "${python}" -m dldkit.bin.asr_train --collect_stats true \
        --config "${exp}/train.yaml" --output_dir "${dir}" --ngpu 0 \
        "${data_options[@]}" "$@" >"${dir}/stats.log" 2>&1 ||
        show_failure "${dir}/stats.log"
    for set in train valid; do
        awk -v vocab="$(wc -l <"${token_list}")" '{ print $0 "," vocab }' \
            "${dir}/${set}/text_shape" >"${dir}/${set}/text_shape.${token_type}"
    done
    echo "${key}" >"${dir}/.done"
}

train_model() { # train_model EXP STATS_DIR [options of asr_train]...
    local exp=$1 stats=$2 options set
    shift 2
    stage_needs "${stats}/.done" "the stage before"
    hold_to_data "${exp}" "$(<"${stats}/.done")"
    set_data_options
    options=(--config "${exp}/train.yaml" --output_dir "${exp}" --resume true
        "${data_options[@]}")
    if [ "${feats_normalize}" == global_mvn ]; then
        options+=(--normalize global_mvn
            --normalize_conf "stats_file=${stats}/train/feats_stats.npz")
    else
        options+=(--normalize "${feats_normalize}")
    fi
    for set in train valid; do
        options+=("--${set}_shape_file" "${stats}/${set}/speech_shape"
            "--${set}_shape_file" "${stats}/${set}/text_shape.${token_type}")
    done
    options+=(--fold_length "${speech_fold_length}" --fold_length 150 "$@")
    run_training "${exp}" "${inference_asr_model}" \
        "${python}" -m dldkit.bin.asr_train "${options[@]}"
}

num_layers() { # num_layers EXP
    "${python}" -m dldkit.bin.merge_config "$1/config.yaml" --select encoder_conf.num_blocks
}

existing_depths() { # existing_depths EXP DEPTHS: those that the encoder has
    local depth layers
    layers=$(num_layers "$1")
    for depth in $2; do
        if [ "${depth}" -le "${layers}" ]; then echo "${depth}"; fi
    done | sort -rnu | tr '\n' ' '
}

decode() { # decode EXP DEPTHS CALIBRATED_DEPTHS
    local exp=$1 set data_dirs=()
    stage_needs "${exp}/${inference_asr_model}" "its training"
    for set in ${test_sets}; do
        stage_needs "${data_feats}/${set}/${scp}" "stage 3"
        data_dirs+=("${data_feats}/${set}")
    done
    if "${use_depth_profile}" && [ -n "$3" ]; then
        "${python}" -m dldkit.bin.calibrate \
            --asr_model_file "${exp}/${inference_asr_model}" \
            --data_dir "${data_feats}/${train_set}" \
            --depths "$3" \
            --selector "${selector}" \
            --num_utts "${calibration_utts}" \
            --output "${exp}/depth_profile.pth"
    fi
    "${python}" -m dldkit.bin.decode \
        --asr_exp "${exp}" \
        --inference_asr_model "${inference_asr_model}" \
        --data_dirs "${data_dirs[*]}" \
        --depths "$2" \
        --inference_tag "${inference_tag}" \
        --inference_args="--selector ${selector} --depth_profile ${depth_profile} ${inference_args}" \
        --inference_nj "${inference_nj}" \
        "${parallel_options[@]}"
}

write_model_card() {
    local model choice
    read -r -a choice <<<"${inference_depths}"
    model=$(basename "${asr_exp}")/$(basename "$(readlink -f "${asr_exp}/${inference_asr_model}")")
    cat <<EOF
---
language: ${lang}
tags:
- espnet
- audio
- automatic-speech-recognition
library_name: espnet
---

# ${asr_tag}: speech recognition with an encoder depth chosen at run time

Trained with dldkit (system \`${system}\`) on \`${train_set}\`.

\`\`\`python
from dldkit.asr.inference import Speech2Text

speech2text = Speech2Text(
    asr_train_config="${asr_exp}/config.yaml",
    asr_model_file="${asr_exp}/${model#*/}",
)
speech2text.set_depth(${choice[${#choice[@]} / 2]})  # encoder layers to run
text, *_ = speech2text(speech)[0]  # ${fs} Hz
\`\`\`

EOF
    if [ -f "${asr_exp}/RESULTS.md" ]; then
        sed -n '/^## Accuracy/,$p' "${asr_exp}/RESULTS.md"
    fi
    echo "## Training config"
    echo
    echo '```yaml'
    cat "${asr_exp}/train.yaml"
    echo '```'
}

#
# Data
#
all_sets=
for set in "${unperturbed_set}" "${valid_set}" ${test_sets}; do
    if [[ " ${all_sets} " != *" ${set} "* ]]; then all_sets+="${all_sets:+ }${set}"; fi
done

if run_stage 1 "${skip_data_prep}"; then
    log "Stage 1: Data preparation for ${all_sets}"
    mapfile -t options < <(words "${local_data_opts}")
    local/data.sh "${options[@]}"
    read -r -a dirs <<<"${all_sets}"
    "${python}" -m dldkit.bin.validate_data "${dirs[@]/#/data/}"
fi

if run_stage 2 "${skip_data_prep}"; then
    if [ -n "${speed_perturb_factors}" ]; then
        log "Stage 2: Speed perturbation: data/${unperturbed_set} -> data/${train_set}"
        "${python}" -m dldkit.bin.perturb_speed --factors "${speed_perturb_factors}" \
            "data/${unperturbed_set}" "data/${train_set}"
    else
        log "Stage 2: No speed perturbation"
    fi
fi

if run_stage 3 "${skip_data_prep}"; then
    log "Stage 3: Format: data/ -> ${data_feats}"
    for set in ${all_sets/#${unperturbed_set}/${train_set}}; do
        dst=${data_feats}/${set}
        # stage 4 brings these to their place
        if [[ ${set} == "${train_set}" || ${set} == "${valid_set}" ]]; then
            dst=${data_feats}/org/${set}
        fi
        "${python}" -m dldkit.bin.format_data --feats_type "${feats_type}" \
            --fs "${fs}" --audio_format "${audio_format}" --n_mels "${n_mels}" \
            --nj "${nj}" "${parallel_options[@]}" "data/${set}" "${dst}"
    done
fi

if run_stage 4 "${skip_data_prep}"; then
    log "Stage 4: Length filter: ${data_feats}/org -> ${data_feats}"
    for set in "${train_set}" "${valid_set}"; do
        stage_needs "${data_feats}/org/${set}" "stage 3"
        "${python}" -m dldkit.bin.filter_data --fs "${fs}" \
            --min_length "${min_length}" --max_length "${max_length}" \
            "${data_feats}/org/${set}" "${data_feats}/${set}"
    done
fi

if run_stage 5 "${skip_data_prep}"; then
    log "Stage 5: Token list: ${token_list}"
    stage_needs "${data_feats}/${train_set}/text" "stages 3 and 4"
    options=(--token_type "${token_type}" --output "${token_list}")
    text=${data_feats}/${train_set}/text
    if [ "${token_type}" == bpe ]; then
        text=${bpe_train_text:-${text}}
        options+=(--nbpe "${nbpe}" --bpe_mode "${bpe_mode}"
            --bpe_model_prefix "${bpemodel%.model}")
    fi
    if [ "${nlsyms_txt}" != none ]; then options+=(--nlsyms "${nlsyms_txt}"); fi
    mkdir -p "${token_dir}"
    "${python}" -m dldkit.bin.make_token_list --text "${text}" "${options[@]}"
fi

#
# The reference model
#
if run_stage 6 "${skip_reference}" "${skip_train}"; then
    log "Stage 6: Statistics for the reference: ${reference_stats_dir}"
    write_config "${reference_exp}" "${reference_config}" "${systems}/static.yaml"
    collect_stats "${reference_stats_dir}" "${reference_exp}" "${reference_options[@]}"
fi

if run_stage 7 "${skip_reference}" "${skip_train}"; then
    log "Stage 7: Reference training: ${reference_exp}"
    write_config "${reference_exp}" "${reference_config}" "${systems}/static.yaml"
    train_model "${reference_exp}" "${reference_stats_dir}" "${reference_options[@]}"
fi

if run_stage 8 "${skip_reference}" "${skip_eval}"; then
    log "Stage 8: Reference decoding: ${reference_exp}/${inference_tag}"
    stage_needs "${reference_exp}/${inference_asr_model}" "stage 7"
    full=$(num_layers "${reference_exp}")
    depths=$(existing_depths "${reference_exp}" "${full} ${inference_depths}")
    # Its own statistics fit its full depth; the others are calibrated, as the student's.
    decode "${reference_exp}" "${depths}" "${depths#"${full} "}"
fi

if run_stage 9 "${skip_reference}" "${skip_train}"; then
    if [ "${kd_source}" == cached ]; then
        log "Stage 9: Posteriors of the reference: ${reference}"
        stage_needs "${reference_exp}/${inference_asr_model}" "stage 7"
        "${python}" -m dldkit.bin.collect_posteriors \
            --reference "${reference_exp}/${inference_asr_model}" \
            --data_dirs "${data_feats}/${train_set}" "${data_feats}/${valid_set}" \
            --output_dir "${reference}" ${top_k:+--top_k "${top_k}"} \
            --nj "${nj}" "${parallel_options[@]}"
    else
        log "Stage 9: No cached posteriors: the reference runs beside the student"
    fi
fi

#
# The student model
#
if run_stage 10 "${skip_train}"; then
    log "Stage 10: Statistics for ${system}: ${asr_stats_dir}"
    write_config "${asr_exp}" "${asr_config}" "${systems}/${system}.yaml" \
        "model_conf.reference=${reference}"
    collect_stats "${asr_stats_dir}" "${asr_exp}" "${asr_options[@]}"
fi

if run_stage 11 "${skip_train}"; then
    log "Stage 11: Training of ${system}: ${asr_exp}"
    write_config "${asr_exp}" "${asr_config}" "${systems}/${system}.yaml" \
        "model_conf.reference=${reference}"
    if grep -Fq "reference: ${reference}" "${asr_exp}/train.yaml"; then
        stage_needs "${reference}" "stages 6 to 9"
    fi
    train_model "${asr_exp}" "${asr_stats_dir}" "${asr_options[@]}"
fi

if run_stage 12 "${skip_eval}"; then
    log "Stage 12: Decoding at each depth: ${asr_exp}/${inference_tag}"
    stage_needs "${asr_exp}/${inference_asr_model}" "stage 11"
    depths=$(existing_depths "${asr_exp}" "${inference_depths}")
    [ -n "${depths}" ] ||
        die "--inference_depths ${inference_depths}: ${asr_exp} has fewer layers"
    decode "${asr_exp}" "${depths}" "${depths}"
fi

if run_stage 13 "${skip_eval}"; then
    log "Stage 13: Scores and depth report: ${asr_exp}/RESULTS.md"
    reported=("${asr_tag}=${asr_exp}")
    depths=${inference_depths}
    if [ "${reference_exp}" != "${asr_exp}" ]; then
        if [ -d "${reference_exp}/${inference_tag}" ]; then
            reported=("${reference_tag}=${reference_exp}" "${reported[@]}")
            depths+=" $(num_layers "${reference_exp}")"
        else
            log "Without the reference: stage 8 has not made ${reference_exp}/${inference_tag}"
        fi
    fi
    dirs=("${reported[@]/#*=/}")
    key=$({
        echo "${reported[*]} ${depths} ${test_sets} ${rtf_utts}"
        find "${dirs[@]}" -path "*/${inference_tag}/*/text" | sort | xargs -r sha256sum
    } | fingerprint)
    if [ "$(cat "${asr_exp}/.report" 2>/dev/null)" == "${key}" ]; then
        log "It is up to date"
    else
        "${python}" -m dldkit.bin.depth_report \
            --system "${reported[@]}" \
            --data_root "${data_feats}" \
            --test_sets "${test_sets}" \
            --depths "$(echo "${depths}" | tr ' ' '\n' | sort -rnu | tr '\n' ' ')" \
            --inference_tag "${inference_tag}" \
            --inference_asr_model "${inference_asr_model}" \
            --selector "${selector}" \
            --depth_profile "${depth_profile}" \
            --frame_shift "${frame_shift}" \
            --rtf_utts "${rtf_utts}" \
            --output_dir "${asr_exp}" >"${asr_exp}/report.log"
        echo "${key}" >"${asr_exp}/.report"
    fi
    sed -n -e '/^- .*: speech: /s/^- //p' -e '/^| *system /,/^$/p' "${asr_exp}/RESULTS.md"
fi

#
# Packing
#
packed=${asr_exp}/${asr_tag}_${inference_asr_model%.pth}.zip

if run_stage 14 "${skip_packing}"; then
    log "Stage 14: Pack: ${packed}"
    stage_needs "${asr_exp}/${inference_asr_model}" "stage 11"
    files=("${asr_exp}/config.yaml" "$(readlink -f "${asr_exp}/${inference_asr_model}")")
    options=()
    for file in "${asr_exp}"/{depth_profile.pth,RESULTS.md,wer_vs_depth.png,images} \
        "${asr_stats_dir}/train/feats_stats.npz" "${bpemodel}"; do
        if [ -e "${file}" ]; then
            options+=(--option "${file}")
            files+=("${file}")
        fi
    done
    if [ -e "${packed}" ] && [ -z "$(find "${files[@]}" -newer "${packed}")" ]; then
        log "It is up to date"
    else
        "${python}" -m dldkit -m espnet2.bin.pack asr \
            --asr_train_config "${asr_exp}/config.yaml" \
            --asr_model_file "${asr_exp}/${inference_asr_model}" \
            "${options[@]}" --outpath "${packed}"
    fi
fi

if run_stage 15 "${skip_upload}"; then
    card_dir=${asr_exp}/huggingface
    log "Stage 15: Model card and files: ${card_dir}"
    stage_needs "${packed}" "stage 14"
    rm -rf "${card_dir}"
    mkdir -p "${card_dir}"
    "${python}" -m zipfile -e "${packed}" "${card_dir}"
    write_model_card >"${card_dir}/README.md"
    if [ -f "${asr_exp}/wer_vs_depth.png" ]; then
        cp "${asr_exp}/wer_vs_depth.png" "${card_dir}"
    fi
    if [ -n "${hf_repo}" ]; then
        log "Pushing to https://huggingface.co/${hf_repo}"
        hf upload "${hf_repo}" "${card_dir}" .
    else
        log "Not pushed: give --hf_repo user/name, and log in with 'hf auth login'"
    fi
fi

log "Successfully finished. [elapsed=${SECONDS}s]"
