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
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
SECONDS=0

## General
stage=1  # first stage to run
stop_stage=15  # last stage to run
skip_stages=  # stages to skip, separated by spaces
skip_data_prep=false  # skip stages 1-5, but with --start_from not stage 5, which makes no data
skip_reference=false  # skip stages 6-9
skip_train=false  # skip stages 6, 7 and 9-11
skip_eval=false  # skip stages 8, 12 and 13
skip_packing=false  # skip stage 14
skip_upload=false  # skip stage 15
ngpu=auto  # GPUs per node for training; auto: 1 if there is one, else 0 (CPU)
num_nodes=1  # nodes for training; more than 1 goes through ESPnet's launcher
launch_args=  # "srun --ntasks 2": training through Slurm (docs/cluster.md); or options of
    # espnet2.bin.launch, e.g. "--host node1,node2"
num_threads=2  # threads of a training on the CPU
nj=2  # parallel jobs for data, statistics and posteriors
inference_nj=2  # parallel jobs for decoding
parallel_config=  # YAML file of a cluster for these jobs, such as conf/slurm.yaml at the top
python=python3  # the Python to run everything with
dumpdir=dump  # directory for formatted data
expdir=exp  # directory for experiments

## Data
train_set=train  # training set: a directory in data/
valid_set=dev  # validation set
test_sets=  # test sets, separated by spaces
local_data_opts=  # options for local/data.sh
lang=en  # language, for the model card and for corpora of several
speed_perturb_factors=  # e.g. "0.9 1.0 1.1"; empty: no speed perturbation
feats_type=raw  # raw (audio), fbank, or extracted (your own feats.scp in data/*/)
audio_format=flac  # of raw: flac or wav, a file each; flac.ark or wav.ark, for big corpora
fs=16000  # sampling rate in Hz, or 16k; other audio is resampled
n_mels=80  # dimension of fbank
frame_shift=0.01  # seconds between the frames of extracted; those of fbank have 0.01
min_wav_duration=0.1  # shorter training and validation utterances are left out (seconds)
max_wav_duration=20  # longer ones too (seconds)

## Tokens
token_type=bpe  # char, bpe or word
nbpe=256  # number of BPE units
bpemode=unigram  # unigram or bpe
bpe_train_text=  # text to train BPE on; empty: the training set's
nlsyms_txt=none  # file of symbols that stay one token each

## Reference model
reference=  # an existing one: experiment directory, checkpoint, packed zip or posteriors
reference_system=  # what to train it as: a file of conf/systems; empty: early_exit where the
    # student begins with its weights (anytime), else static
reference_config=  # training config; empty: that of --asr_config
reference_args=  # more options of asr_train for the reference, e.g. "--max_epoch 20"
reference_tag=  # suffix of its experiment directory; empty: made from the settings
kd_source=live  # live (the reference runs beside the student) or cached (stage 9)
top_k=  # keep K tokens per frame in cached posteriors; empty: all

## Student model
system=early_exit_half  # what to train: a file of conf/systems, such as static, anytime or dld
asr_config=conf/train_asr.yaml  # training config; that of --system is merged over it
asr_args=  # more options of asr_train, e.g. "--max_epoch 20 --model_conf kd_weight=0.5"
asr_tag=  # suffix of its experiment directory; empty: made from the settings
asr_exp=  # its experiment directory; empty: asr_TAG in --expdir
asr_stats_dir=  # directory of its statistics; empty: made from the settings
start_from=  # trained model to convert: experiment, checkpoint, zip or Hugging Face name
    # what it is (architecture, tokens, normalisation) is kept; it is the reference, if
    # the system has one, and the report shows it beside the student
pretrained_model=  # checkpoint to begin with, as --init_param takes it
seed=  # seed of both trainings; empty: that of the config
feats_normalize=global_mvn  # global_mvn, utterance_mvn or none
stats_utts=20000  # utterances of a set that its mean and variance are computed from, at most

## Inference
inference_asr_model=valid.loss_ctc.ave.pth  # checkpoint to decode with
inference_depths="12 10 8 6 4 2"  # numbers of encoder layers to decode with
exit_thresholds=auto  # early stopping by confidence, for systems with exits: none, "0.02 0.05",
    # or auto: those with mean depths of --inference_depths on the validation set
inference_config=  # YAML file of options of asr_inference
inference_args=  # more options of asr_inference, e.g. "--beam_size 10"; default: greedy CTC
inference_tag=  # name of the decoding directory; empty: made from the settings
gpu_inference=false  # decode, and collect the reference's posteriors, on a GPU
use_lm=false  # decode with an existing language model; needs --beam_size above 1
lm_exp=  # its experiment directory
lm_file=  # its checkpoint; empty: valid.loss.ave.pth in --lm_exp
selector=  # which layers a depth means: even or prefix; empty: as the model was trained
use_depth_profile=true  # re-estimate BatchNorm statistics for each depth before decoding
calibration_utts=300  # training utterances to do that on
rtf_utts=20  # utterances to measure the real-time factor on; 0: do not measure

## Packing
license=cc-by-4.0  # of the model, for the model card; that of the speech may decide it
datasets=  # of the model card; empty: the recipe's name
hf_repo=  # Hugging Face repository (user/name) to push to; empty: only prepare the directory

template=$(dirname "$(readlink -f "$0")")
# shellcheck source=options.sh
. "${template}/options.sh" "$@"
# shellcheck source=path.sh
. ./path.sh
# shellcheck source=functions.sh
. "${template}/functions.sh"

systems="${template%/egs2/*}/conf/systems"
needs_reference= # whether the system's config leaves one open
given_values= # those that stand for what --asr_args give in its place
begins_with= # what its weights begin with, where it leaves that open: random or reference
valid_depths= # for the student's validation, as [12,6,2]
start_name= # of what comes from --start_from
exits= # where utterances may stop early
check_options asr "${systems}"

#
# What follows from the options
#
unperturbed_set=${train_set}
sp=
if [ -n "${speed_perturb_factors}" ]; then
    sp=_sp
    train_set=${train_set}_sp
fi
data_feats=${dumpdir}/${feats_type}
format_options=(--feats_type "${feats_type}" --n_mels "${n_mels}")
text_option=()
if [ "${feats_type}" == raw ]; then
    scp=wav.scp
    data_type=sound
    if [[ ${audio_format} == *.ark ]]; then data_type=kaldi_ark; fi
    speech_fold_length=80000 # samples
    per_second=1
else
    scp=feats.scp
    data_type=kaldi_ark
    speech_fold_length=800 # frames
    per_second="1 / ${frame_shift}"
fi
filter_options=(
    --min_length "$(awk "BEGIN { print ${min_wav_duration} * ${per_second} }")"
    --max_length "$(awk "BEGIN { print ${max_wav_duration} * ${per_second} }")"
)

tokens=${token_type}
if [ "${token_type}" == bpe ]; then tokens=bpe_${bpemode}${nbpe}; fi
if [ "${lang}" != en ]; then tokens=${lang}_${tokens}; fi # one recipe may have several
token_list=data/token_list/${tokens}/tokens.txt
if [ -n "${start_from}" ]; then
    tokens=${start_name}
    reference_tag=${reference_tag:-${start_name}}
    token_list=${expdir}/asr_${reference_tag}/tokens.txt
fi
bpemodel=none
if [ "${token_type}" == bpe ]; then bpemodel=${token_list%/*}/bpe.model; fi

# Names as ESPnet's: feature and token type, and the settings that were changed
data_tag=_${feats_type}_${tokens}
suffix=${sp}${seed:+_seed${seed}}
reference_config=${reference_config:-${asr_config}}
reference_tag=${reference_tag:-${reference_system}$(name_of "${reference_config}" train_asr)${data_tag}$(name_of_args "${reference_args}")${suffix}}
reference_exp=${expdir}/asr_${reference_tag}
top=${top_k:+_top${top_k}} # a directory for each: others may be read by a training
if [ -z "${asr_tag}" ]; then
    asr_tag=${system}$(name_of "${asr_config}" train_asr)${data_tag}$(name_of_args "${asr_args}")${suffix}
    if "${needs_reference}" && [ "${kd_source}" == cached ]; then asr_tag+=_cached${top}; fi
fi
if [ -n "${asr_exp}" ]; then asr_tag=$(basename "${asr_exp}"); fi
asr_exp=${asr_exp:-${expdir}/asr_${asr_tag}}
if "${needs_reference}" && [ "${asr_exp}" == "${reference_exp}" ]; then
    die "${asr_exp} would be of the reference and of ${system}: give another --asr_tag or --reference_tag"
fi

no_reference= # why there are no stages 6 and 7
no_reference_training= # why there are none, though there is a reference
no_posteriors= # why there is no stage 9
if [ -n "${start_from}" ]; then no_reference_training="the model is ${start_from}"; fi
read -r -a student_settings <<<"${given_values}"
if [ -n "${valid_depths}" ]; then
    student_settings+=("model_conf.valid_depths=${valid_depths}")
fi
if ! "${needs_reference}"; then
    no_reference="${system} needs no reference"
elif [ -n "${reference}" ]; then
    no_reference="the reference is ${reference}"
fi
no_decoded_reference=${no_reference} # why there is no stage 8
if [ -n "${start_from}" ]; then no_decoded_reference=; fi # it is what the student has to match
reference_model=${reference:-${reference_exp}/${inference_asr_model}}
if ! "${needs_reference}" || [ -e "${reference}/posteriors.scp" ]; then
    no_posteriors=${no_reference}
elif [ "${kd_source}" == live ]; then
    no_posteriors="the reference runs beside the student"
    reference=${reference_model}
elif [ -n "${reference}" ]; then
    reference=${asr_exp}/posteriors${top}
else
    reference=${reference_exp}/posteriors${top}
fi
if "${needs_reference}"; then
    student_settings+=("model_conf.reference=${reference}")
fi
if [ -n "${begins_with}" ]; then student_settings+=("init_param=[]"); fi
if [ "${begins_with}" == random ] && [ -z "${start_from}${pretrained_model}" ] &&
    [ "${stage}" -le 11 ] && [ "${stop_stage}" -ge 6 ]; then
    log "${system} will begin with random weights, which costs accuracy. It begins with those" \
        "of its reference where this recipe trains one with the same architecture: give" \
        "--reference_args what --asr_args change of it"
fi

# Statistics depend on the data and the frontend only, so that systems share them.
asr_stats_dir=${asr_stats_dir:-${expdir}/asr_stats${data_tag}${sp}}
reference_stats_dir=${asr_stats_dir}
if [ "${reference_config}" != "${asr_config}" ] || [[ ${reference_args} == *--frontend* ]]
then
    reference_stats_dir=${asr_stats_dir}_${reference_tag}
fi

inference_options=()
if [ -n "${selector}" ]; then inference_options+=(--selector "${selector}"); fi
if ! "${use_depth_profile}"; then inference_options+=(--depth_profile none); fi
report_options=("${inference_options[@]}")
gpu_options=()
if "${gpu_inference}"; then gpu_options=(--ngpu 1); fi
inference_options+=("${gpu_options[@]}")
if [ -n "${inference_config}" ]; then inference_options+=(--config "${inference_config}"); fi
lm=
if "${use_lm}"; then
    lm_file=${lm_file:-${lm_exp}/valid.loss.ave.pth}
    lm_exp=${lm_exp:-$(dirname "${lm_file}")}
    inference_options+=(--lm_train_config "${lm_exp}/config.yaml" --lm_file "${lm_file}")
    lm=_lm_$(basename "${lm_exp}")_$(basename "${lm_file}" .pth)
fi
if [ -z "${inference_tag}" ]; then
    inference_tag=decode_${inference_asr_model%.pth}$(name_of "${inference_config}" "")
    inference_tag+=$(name_of_args "${inference_args}")${lm}${selector:+_${selector}}
    if ! "${use_depth_profile}"; then inference_tag+=_uncalibrated; fi
fi

mapfile -t reference_options < <(words "${reference_args} ${seed:+--seed ${seed}}")
mapfile -t asr_options < <(words "${asr_args} ${seed:+--seed ${seed}}")
if [ -n "${start_from}" ] || [ "${begins_with}" == reference ]; then
    pretrained_model=${pretrained_model:-${reference_exp}/${inference_asr_model}}
fi
if [ -n "${pretrained_model}" ]; then asr_options+=(--init_param "${pretrained_model}"); fi

#
# Steps that the reference and the student share
#
set_data_options() { # data_options: what asr_train has to know of the data
    local set
    stage_needs "${token_list}" "stage 5"
    data_options=(--use_preprocessor true)
    if [ -z "${start_from}" ]; then # whose config says it
        data_options+=(
            --token_type "${token_type}"
            --token_list "${token_list}"
            --bpemodel "${bpemodel}"
            --non_linguistic_symbols "${nlsyms_txt}"
            --cleaner none
            --g2p none
        )
    fi
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
    local dir=$1 exp=$2
    shift 2
    set_data_options
    "${python}" -m dldkit.bin.collect_stats asr --stats_utts "${stats_utts}" \
        --nj "${nj}" "${parallel_options[@]}" \
        --config "${exp}/train.yaml" --output_dir "${dir}" "${data_options[@]}" "$@"
}

train_model() { # train_model EXP STATS_DIR [options of asr_train]...
    local exp=$1 stats=$2 options set
    shift 2
    stage_needs "${stats}/valid/text_shape.${token_type}" "the stage before"
    set_data_options
    options=(--config "${exp}/train.yaml" --output_dir "${exp}" --resume true
        "${data_options[@]}")
    if [ -n "${start_from}" ]; then
        : # its config says it
    elif [ "${feats_normalize}" == global_mvn ]; then
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
    run_training "${exp}" "${python}" -m dldkit.bin.asr_train "${options[@]}"
}

num_layers() { # num_layers EXP
    "${python}" -m dldkit.bin.merge_config "$1/config.yaml" --select encoder_conf.num_blocks
}

decode() { # decode EXP DEPTHS CALIBRATED_DEPTHS [EXIT_THRESHOLDS]
    local exp=$1 set dir data_dirs=()
    stage_needs "${exp}/${inference_asr_model}" "its training"
    for set in ${test_sets}; do
        dir=$(test_set_dir "${set}")
        stage_needs "${dir}/${scp}" "stage 3"
        data_dirs+=("${dir}")
    done
    if "${use_depth_profile}" && [ -n "$3" ]; then
        "${python}" -m dldkit.bin.calibrate \
            --asr_model_file "${exp}/${inference_asr_model}" \
            --data_dir "${data_feats}/${train_set}" \
            --depths "$3" ${selector:+--selector "${selector}"} \
            --num_utts "${calibration_utts}"
    fi
    "${python}" -m dldkit.bin.decode \
        --asr_exp "${exp}" \
        --inference_asr_model "${inference_asr_model}" \
        --data_dirs "${data_dirs[@]}" \
        --depths "$2" \
        --exit_thresholds "${4:-none}" \
        --valid_dir "${data_feats}/${valid_set}" \
        --inference_tag "${inference_tag}" \
        --inference_args="${inference_options[*]@Q} ${inference_args}" \
        --nj "${inference_nj}" \
        "${parallel_options[@]}"
}

#
# Data
#
if run_stage 1 "${skip_data_prep}"; then
    log "Stage 1: Data preparation: data/"
    mapfile -t options < <(words "${local_data_opts}")
    # In variables, as not every local/data.py has these options
    DLDKIT_NJ=${nj} DLDKIT_LANG=${lang} local/data.sh "${options[@]}"
    mapfile -t dirs < <(words "${unperturbed_set} ${valid_set} ${test_sets}" | sort -u)
    "${python}" -m dldkit.bin.validate_data "${dirs[@]/#/data/}"
fi

no_speeds=
if [ -z "${speed_perturb_factors}" ]; then no_speeds="no --speed_perturb_factors"; fi
if run_stage 2 "${no_speeds}" "${skip_data_prep}"; then
    log "Stage 2: Speed perturbation: data/${unperturbed_set} -> data/${train_set}"
    "${python}" -m dldkit.bin.perturb_speed --factors "${speed_perturb_factors}" \
        "data/${unperturbed_set}" "data/${train_set}"
fi

other_sets=
for set in ${test_sets}; do
    if [ "${set}" != "${valid_set}" ]; then other_sets+=" ${set}"; fi
done
if run_stage 3 "${skip_data_prep}"; then stage_format; fi
if run_stage 4 "${skip_data_prep}"; then stage_filter; fi

if [ -n "${start_from}" ]; then
    if run_stage 5; then
        log "Stage 5: Model to start from, with its tokens: ${reference_exp}"
        "${python}" -m dldkit.bin.start_from "${start_from}" \
            --asr_config "${asr_config}" --outpath "${pretrained_model}"
    fi
    asr_config=${reference_exp}/student.yaml
elif run_stage 5 "${skip_data_prep}"; then
    log "Stage 5: Token list: ${token_list}"
    stage_needs "${data_feats}/${train_set}/text" "stages 3 and 4"
    options=(--token_type "${token_type}" --output "${token_list}")
    text=${data_feats}/${train_set}/text
    if [ "${token_type}" == bpe ]; then
        text=${bpe_train_text:-${text}}
        options+=(--nbpe "${nbpe}" --bpe_mode "${bpemode}")
    fi
    if [ "${nlsyms_txt}" != none ]; then options+=(--nlsyms "${nlsyms_txt}"); fi
    mkdir -p "${token_list%/*}"
    "${python}" -m dldkit.bin.make_token_list --text "${text}" "${options[@]}"
fi

#
# The reference model
#
if run_stage 6 "${no_reference}" "${no_reference_training}" "${skip_reference}" "${skip_train}"; then
    log "Stage 6: Statistics for the reference: ${reference_stats_dir}"
    write_config "${reference_exp}" "${reference_config}" "${reference_system}"
    collect_stats "${reference_stats_dir}" "${reference_exp}" "${reference_options[@]}"
fi

if run_stage 7 "${no_reference}" "${no_reference_training}" "${skip_reference}" "${skip_train}"; then
    log "Stage 7: Reference training: ${reference_exp}"
    write_config "${reference_exp}" "${reference_config}" "${reference_system}"
    train_model "${reference_exp}" "${reference_stats_dir}" "${reference_options[@]}"
fi

if run_stage 8 "${no_decoded_reference}" "${skip_reference}" "${skip_eval}"; then
    log "Stage 8: Reference decoding: ${reference_exp}/${inference_tag}"
    stage_needs "${reference_exp}/${inference_asr_model}" "stages 5 to 7"
    # at the one depth that it was trained for, which its own statistics fit
    decode "${reference_exp}" "$(num_layers "${reference_exp}")" ""
fi

if run_stage 9 "${no_posteriors}" "${skip_reference}" "${skip_train}"; then
    log "Stage 9: Posteriors of the reference: ${reference}"
    stage_needs "${reference_model}" "stage 7"
    "${python}" -m dldkit.bin.collect_posteriors --reference "${reference_model}" \
        --data_dirs "${data_feats}/${train_set}" "${data_feats}/${valid_set}" \
        --output_dir "${reference}" ${top_k:+--top_k "${top_k}"} \
        --nj "${nj}" "${gpu_options[@]}" "${parallel_options[@]}"
fi

#
# The student model
#
if run_stage 10 "${skip_train}"; then
    log "Stage 10: Statistics for ${system}: ${asr_stats_dir}"
    write_config "${asr_exp}" "${asr_config}" "${system}" "${student_settings[@]}"
    collect_stats "${asr_stats_dir}" "${asr_exp}" "${asr_options[@]}"
fi

if run_stage 11 "${skip_train}"; then
    log "Stage 11: Training of ${system}: ${asr_exp}"
    write_config "${asr_exp}" "${asr_config}" "${system}" "${student_settings[@]}"
    if "${needs_reference}"; then stage_needs "${reference}" "stages 6 to 9"; fi
    train_model "${asr_exp}" "${asr_stats_dir}" "${asr_options[@]}"
fi

if run_stage 12 "${skip_eval}"; then
    log "Stage 12: Decoding at each depth: ${asr_exp}/${inference_tag}"
    stage_needs "${asr_exp}/${inference_asr_model}" "stage 11"
    # an exit is where utterances may stop, if its statistics are known
    decode "${asr_exp}" "${inference_depths}" "${inference_depths} ${exits}" \
        "${exit_thresholds}"
fi

if run_stage 13 "${skip_eval}"; then
    log "Stage 13: Scores and depth report: ${asr_exp}/RESULTS.md"
    reported=("${asr_tag}=${asr_exp}")
    depths=${inference_depths}
    if [ -z "${no_decoded_reference}" ]; then
        if [ -d "${reference_exp}/${inference_tag}" ]; then
            reported=("${reference_tag}=${reference_exp}" "${reported[@]}")
            depths+=" $(num_layers "${reference_exp}")"
        else
            log "Without the reference: stage 8 has not made ${reference_exp}/${inference_tag}"
        fi
    fi
    "${python}" -m dldkit.bin.depth_report \
        --system "${reported[@]}" \
        --data_root "${data_feats}" \
        --test_sets "${test_sets}" \
        --depths "$(echo "${depths}" | tr ' ' '\n' | sort -rnu | tr '\n' ' ')" \
        --inference_tag "${inference_tag}" \
        --inference_asr_model "${inference_asr_model}" \
        --frame_shift "${frame_shift}" \
        --rtf_utts "${rtf_utts}" \
        --output_dir "${asr_exp}" \
        "${report_options[@]}" >"${asr_exp}/report.log"
    sed -n -e '/^- .*: speech: /s/^- //p' -e '/^| *\(system\|early stopping\) /,/^$/p' \
        "${asr_exp}/RESULTS.md"
fi

#
# Packing
#
packed=${asr_exp}/pack_${inference_asr_model%.pth}/${asr_tag}.zip
card_dir=${asr_exp}/huggingface

if run_stage 14 "${skip_packing}"; then
    log "Stage 14: Pack: ${packed}"
    pack asr "${asr_exp}" "${inference_asr_model}" \
        --data_dir "$(test_set_dir "${test_sets%% *}")"
fi

if run_stage 15 "${skip_upload}"; then
    log "Stage 15: Model card and files: ${card_dir}"
    stage_needs "${packed}" "stage 14"
    rm -rf "${card_dir}"
    "${python}" -m zipfile -e "${packed}" "${card_dir}"
    read -r -a choice <<<"${inference_depths}"
    title="${asr_tag}: speech recognition with an encoder depth chosen at run time"
    card_library=espnet
    card_args="${asr_args}${seed:+ --seed ${seed}}"
    card_task=automatic-speech-recognition
    card_tags="espnet audio automatic-speech-recognition"
    snippet="\`\`\`sh
pip install /path/to/dldkit  # a checkout of it
\`\`\`

\`\`\`python
from dldkit.asr.inference import Speech2Text

speech2text = Speech2Text.from_pretrained(\"${hf_repo:-$(realpath "${packed}")}\")
speech2text.set_depth(${choice[${#choice[@]} / 2]})  # encoder layers to run
text, *_ = speech2text(speech)[0]  # speech: (Samples,) at ${fs} Hz
\`\`\`"
    upload "${asr_exp}"
fi

log "Successfully finished. [elapsed=${SECONDS}s]"
