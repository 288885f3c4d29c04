#!/usr/bin/env bash
# Distil a speech foundation model into a small student; score what the student learned.
#
#   cd egs2/<corpus>/ssl1 && ./run.sh [--option value]...
#
# Stages:
#    1 data preparation            10 statistics      14 pack
#    3 format                      11 training        15 upload
#    4 length filter               12 export
#    9 cached targets of teacher   13 probe scores
# Numbers are those of asr.sh; the missing ones have no use here. Every stage may be run
# again: what is finished is kept, and a training goes on where it stopped.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail
SECONDS=0

## General
stage=1  # first stage to run
stop_stage=15  # last stage to run
skip_stages=  # stages to skip, separated by spaces
skip_data_prep=false  # skip stages 1-4
skip_train=false  # skip stages 9-11
skip_eval=false  # skip stage 13
skip_packing=false  # skip stage 14
skip_upload=false  # skip stage 15
ngpu=auto  # GPUs per node for training; auto: 1 if there is one, else 0 (CPU)
num_nodes=1  # nodes for training; more than 1 goes through ESPnet's launcher
launch_args=  # "srun --ntasks 2": training through Slurm (docs/cluster.md); or options of
    # espnet2.bin.launch, e.g. "--host node1,node2"
num_threads=2  # threads of a training on the CPU
nj=2  # parallel jobs for data and targets
parallel_config=  # YAML file of a cluster for these jobs, such as conf/slurm.yaml at the top
python=python3  # the Python to run everything with
dumpdir=dump  # directory for formatted data
expdir=exp  # directory for experiments

## Data
train_set=train  # training set: a directory in data/; transcripts are not needed
train_shar=  # directory of lhotse's Shar that is streamed in place of train_set; empty: train_set
valid_set=valid  # validation set
local_data_opts=  # options for local/data.sh
lang=en  # language, for the model card and for corpora of several
audio_format=flac  # flac or wav, a file each; flac.ark or wav.ark, for big corpora
fs=16000  # sampling rate in Hz, or 16k: the teacher's; other audio is resampled
min_wav_duration=0.5  # shorter utterances are left out (seconds)
max_wav_duration=30  # longer ones too (seconds)

## Teacher
teacher=  # directory or Hugging Face name of HuBERT, WavLM, wav2vec2 or Whisper; empty: $TEACHER
targets=live  # live (the teacher runs beside the student), cached (stage 9 writes what it says)
    # or cached_features (and what its CNN makes of the audio, which training reads in its place)
targets_dtype=float16  # of cached targets: float16, or int8 at half the size

## Student
system=full  # how the student grows: a file of conf/systems_ssl
    # (full interleave_eql interleave_prop1 stackbert gradstack midas every_depth fast)
sfm_config=conf/train_sfm.yaml  # training config; that of --system is merged over it
sfm_args=  # more options of sfm_distill_train, e.g. "--max_epoch 20 --model_conf loss=l1_cosine"
sfm_tag=  # suffix of its experiment directory; empty: made from the settings
seed=  # seed of the training; empty: that of the config
inference_model=valid.loss.ave.pth  # checkpoint to export
export_depths=  # other depths to export too, e.g. "9 6 3"; empty: the exits of the training
selector=  # which layers such a depth means: even or prefix; empty: as the student was trained

## Scores
probe=probe  # probe (on the recipe's own sets), superb (SUPERB, on the corpora you have) or none
probe_digits="digits_train digits_test"  # single words and their speakers: training and test set
probe_strings="strings_train strings_test"  # transcribed utterances: training and test set
probe_args=  # more options of sfm_probe, e.g. '--seeds "0 1 2"'
superb_args=  # more options of sfm_superb, e.g. "--tasks 'pr ks' --lr pr=5e-4"

## Packing
license=cc-by-4.0  # of the model, for the model card; that of the speech may decide it
datasets=  # of the model card; empty: the recipe's name
hf_repo=  # Hugging Face repository (user/name) to push to; empty: only prepare the directory

template=$(dirname "$(readlink -f "$0")")
# shellcheck source=../asr1/options.sh
. "${template}/../asr1/options.sh" "$@"
# shellcheck source=../asr1/path.sh
. ./path.sh
# shellcheck source=../asr1/db.sh
. ./db.sh
# shellcheck source=../asr1/functions.sh
. "${template}/../asr1/functions.sh"

systems="${template%/egs2/*}/conf/systems_ssl"
teacher_layers= # what the config says
segment_seconds= # its max_seconds
check_options sfm "${systems}"

#
# What follows from the options
#
probe_sets=
if [ "${probe}" == probe ]; then probe_sets="${probe_digits} ${probe_strings}"; fi
teacher_name=$(basename "${teacher}")
no_targets= # why there is no stage 9
# other segments, sizes or layers are other targets, beside these
targets_from=${expdir}/targets_${teacher_name}_cut${segment_seconds}
if [ "${targets_dtype}" != float16 ]; then targets_from+=_${targets_dtype}; fi
if [ -n "${teacher_layers}" ]; then targets_from+=_layers${teacher_layers// /-}; fi
if [ "${targets}" == live ]; then
    no_targets="the teacher runs beside the student"
    targets_from=${teacher}
fi
reads_features=false
feature_option=()
if [ "${targets}" == cached_features ]; then
    reads_features=true
    feature_option=(--features)
fi
if [ -z "${sfm_tag}" ]; then
    sfm_tag=${system}$(name_of "${sfm_config}" train_sfm)$(name_of_args "${sfm_args}")${seed:+_seed${seed}}
    sfm_tag+=${train_shar:+_$(basename "${train_shar}")}
fi
sfm_exp=${expdir}/sfm_${sfm_tag}
trained_on=${train_shar:-${train_set}}
if [ -n "${train_shar}" ]; then train_set=${valid_set}; fi # nothing else is prepared
# of the data alone, so that systems share them
sfm_stats_dir=${expdir}/sfm_stats_${train_set}_${valid_set}_cut${segment_seconds}
data_feats=${dumpdir}/raw
data_type=sound
if [[ ${audio_format} == *.ark ]]; then data_type=kaldi_ark; fi
train_dir=${data_feats}/${train_set}_cut${segment_seconds} # what stage 4 cuts
valid_dir=${data_feats}/${valid_set}_cut${segment_seconds}
other_sets=${probe_sets}
format_options=()
filter_options=(--min_length "${min_wav_duration}" --max_length "${max_wav_duration}")
text_option=(--no_text)

mapfile -t sfm_options < <(words "${sfm_args} ${seed:+--seed ${seed}}")

#
# Steps
#
set_data_options() { # data_options: what sfm_distill_train has to know of the data
    local set
    data_options=()
    for set in train valid; do
        local dir=${train_dir}
        if [ "${set}" == valid ]; then dir=${valid_dir}; fi
        stage_needs "${dir}/wav.scp" "stages 3 and 4"
        data_options+=(
            "--${set}_data_path_and_name_and_type" "${dir}/wav.scp,speech,${data_type}"
        )
    done
}

cut_data() { # cut_data SRC DST: what teacher and student hear, in every epoch the same
    "${python}" -m dldkit.bin.sfm_cut_data "$1" "$2" --max_seconds "${segment_seconds}" \
        --fs "${fs}" --audio_format "${audio_format}" --nj "${nj}" "${parallel_options[@]}"
}

configure() { # write ${sfm_exp}/train.yaml
    write_config "${sfm_exp}" "${sfm_config}" "${system}" \
        "model_conf.teacher=${targets_from}" "cached_features=${reads_features}"
}

collect_stats() { # lengths alone, as the model takes speech as it is
    set_data_options
    "${python}" -m dldkit.bin.collect_stats sfm \
        --config "${sfm_exp}/train.yaml" --output_dir "${sfm_stats_dir}" \
        "${data_options[@]}" "${sfm_options[@]}"
}

train_model() {
    stage_needs "${sfm_stats_dir}/valid/speech_shape" "stage 10"
    set_data_options
    data_options+=(--train_shape_file "${sfm_stats_dir}/train/speech_shape")
    if [ -n "${train_shar}" ]; then
        data_options=(--train_shar "${train_shar}" "${data_options[@]:2:2}") # and valid_set
    fi
    run_training "${sfm_exp}" "${python}" -m dldkit.bin.sfm_distill_train \
        --config "${sfm_exp}/train.yaml" --output_dir "${sfm_exp}" --resume true \
        "${data_options[@]}" \
        --valid_shape_file "${sfm_stats_dir}/valid/speech_shape" \
        "${sfm_options[@]}"
}

export_model() { # export_model DIR [options of sfm_export]...
    local dir=$1
    shift
    "${python}" -m dldkit.bin.sfm_export --model_file "${sfm_exp}/${inference_model}" \
        --config "${sfm_exp}/config.yaml" --output_dir "${dir}" "$@"
}

export_models() {
    local depth
    stage_needs "${sfm_exp}/${inference_model}" "stage 11"
    export_model "${sfm_exp}/hf"
    for depth in ${export_depths}; do
        export_model "${sfm_exp}/hf_depth${depth}" \
            --depth "${depth}" ${selector:+--selector "${selector}"}
    done
}

list_exports() { # exports: the directories that stage 12 makes
    local depth
    exports=("${sfm_exp}/hf")
    for depth in ${export_depths}; do exports+=("${sfm_exp}/hf_depth${depth}"); done
}

write_scores() { # ${sfm_exp}/RESULTS.md: a row for the teacher and for each export
    local dir upstreams=("${teacher_name}=${teacher}") options set digits=() strings=() device=cpu
    if [ "${ngpu}" -gt 0 ]; then device=cuda; fi
    for set in ${probe_digits}; do digits+=("$(test_set_dir "${set}")"); done
    for set in ${probe_strings}; do strings+=("$(test_set_dir "${set}")"); done
    for dir in "${digits[@]}" "${strings[@]}"; do stage_needs "${dir}/wav.scp" "stage 3"; done
    list_exports
    for dir in "${exports[@]}"; do
        stage_needs "${dir}/config.json" "stage 12"
        upstreams+=("${sfm_tag}${dir#"${sfm_exp}/hf"}=${dir}")
    done
    mapfile -t options < <(words "${probe_args}")
    # Those of the teacher serve all experiments.
    OMP_NUM_THREADS=${num_threads} \
        "${python}" -m dldkit.bin.sfm_probe --upstream "${upstreams[@]}" \
        --digits "${digits[@]}" --strings "${strings[@]}" \
        --output_dir "${sfm_exp}" --cache_dir "${expdir}/hidden_states" \
        --device "${device}" "${options[@]}" >"${sfm_exp}/probe.log"
    cat "${sfm_exp}/RESULTS.md"
}

write_superb() { # ${sfm_exp}/RESULTS.md: a row for each export, and published ones
    local dir name options done=() device=cpu
    if [ "${ngpu}" -gt 0 ]; then device=cuda; fi
    mapfile -t options < <(words "${superb_args}")
    list_exports
    for dir in "${exports[@]}"; do
        stage_needs "${dir}/config.json" "stage 12"
        name=${sfm_tag}${dir#"${sfm_exp}/hf"}
        "${python}" -m dldkit.bin.sfm_superb --upstream "${dir}" --upstream_name "${name}" \
            --output_dir "${expdir}/superb_${name}" --device "${device}" "${options[@]}"
        done+=("${expdir}/superb_${name}")
    done
    "${python}" -m dldkit.bin.sfm_superb_table "${done[@]}" >"${sfm_exp}/RESULTS.md"
    cat "${sfm_exp}/RESULTS.md"
}

#
# Data
#
if run_stage 1 "${skip_data_prep}"; then
    log "Stage 1: Data preparation for ${train_set} ${valid_set} ${probe_sets}"
    mapfile -t options < <(words "${local_data_opts}")
    # In variables, as not every local/data.py has these options
    DLDKIT_NJ=${nj} DLDKIT_LANG=${lang} local/data.sh "${options[@]}"
    "${python}" -m dldkit.bin.validate_data --no_text "data/${train_set}" "data/${valid_set}"
    read -r -a dirs <<<"${probe_sets}"
    if [ ${#dirs[@]} -gt 0 ]; then
        "${python}" -m dldkit.bin.validate_data "${dirs[@]/#/data/}"
    fi
fi

if run_stage 3 "${skip_data_prep}"; then stage_format; fi
if run_stage 4 "${skip_data_prep}"; then
    stage_filter
    log "Stage 4: Segments of ${segment_seconds} s at most: ${train_dir} ${valid_dir}"
    cut_data "${data_feats}/${train_set}" "${train_dir}"
    cut_data "${data_feats}/${valid_set}" "${valid_dir}"
fi

#
# Distillation
#
if run_stage 9 "${no_targets}" "${skip_train}"; then
    log "Stage 9: Targets of ${teacher}: ${targets_from}"
    stage_needs "${train_dir}/wav.scp" "stages 3 and 4"
    layer_options=()
    if [ -n "${teacher_layers}" ]; then layer_options=(--layers "${teacher_layers}"); fi
    "${python}" -m dldkit.bin.sfm_collect_targets --teacher "${teacher}" \
        "${layer_options[@]}" "${feature_option[@]}" \
        --data_dirs "${train_dir}" "${valid_dir}" --dtype "${targets_dtype}" \
        --output_dir "${targets_from}" --nj "${nj}" --ngpu $((ngpu > 0)) "${parallel_options[@]}"
fi

if run_stage 10 "${skip_train}"; then
    log "Stage 10: Statistics: ${sfm_stats_dir}"
    configure
    collect_stats
fi

if run_stage 11 "${skip_train}"; then
    log "Stage 11: Training of ${system}: ${sfm_exp}"
    if [ "${targets}" != live ]; then
        stage_needs "${targets_from}/targets.scp" "stage 9"
    fi
    if "${reads_features}"; then
        stage_needs "${targets_from}/features/features.scp" "stage 9"
    fi
    configure
    train_model
    "${python}" -m dldkit.bin.sfm_teacher_loss --config "${sfm_exp}/config.yaml" \
        --teacher "${teacher}" --output_json "${sfm_exp}/teacher_loss.json" ||
        log "The teacher's own loss is not known, see above; the training is finished"
fi

if run_stage 12; then
    log "Stage 12: Export: ${sfm_exp}/hf"
    export_models
elif [ "${stage}" -gt 12 ] && [ -e "${sfm_exp}/${inference_model}" ]; then
    export_models >/dev/null # those that are there may be of another model
fi

if run_stage 13 "${skip_eval}"; then
    case ${probe} in
        probe)
            log "Stage 13: Probe scores: ${sfm_exp}/RESULTS.md"
            write_scores
            ;;
        superb)
            log "Stage 13: SUPERB: ${sfm_exp}/RESULTS.md"
            write_superb
            ;;
        none) log "Stage 13: No scores: --probe none" ;;
    esac
fi

#
# Packing
#
packed=${sfm_exp}/pack_${inference_model%.pth}/${sfm_tag}.zip
card_dir=${sfm_exp}/huggingface

if run_stage 14 "${skip_packing}"; then
    log "Stage 14: Pack: ${packed}"
    stage_needs "${sfm_exp}/hf/config.json" "stage 12"
    list_exports
    pack ssl "${sfm_exp}" "${inference_model}" --exports "${exports[@]##*/}"
fi

if run_stage 15 "${skip_upload}"; then
    log "Stage 15: Model card and files: ${card_dir}"
    stage_needs "${sfm_exp}/hf/config.json" "stage 12"
    rm -rf "${card_dir}"
    mkdir -p "${card_dir}"
    cp "${sfm_exp}"/hf/* "${card_dir}"
    title="${sfm_tag}: ${teacher_name} distilled into a small HuBERT"
    card_library=transformers
    card_args="${sfm_args}${seed:+ --seed ${seed}}"
    card_task=feature-extraction
    card_tags="audio speech hubert"
    repository=${hf_repo:-$(realpath "${card_dir}")}
    snippet="\`\`\`sh
pip install transformers
\`\`\`

\`\`\`python
from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained(\"${repository}\")
extract = AutoFeatureExtractor.from_pretrained(\"${repository}\")
inputs = extract(speech, sampling_rate=${fs}, return_tensors=\"pt\")  # speech: (Samples,)
hidden_states = model(**inputs, output_hidden_states=True).hidden_states
\`\`\`

In ESPnet: \`frontend: huggingface\`, or s3prl's upstream \`hf_hubert_custom\`."
    upload "${sfm_exp}"
fi

log "Successfully finished. [elapsed=${SECONDS}s]"
