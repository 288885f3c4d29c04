# shellcheck shell=bash
# Where corpora and teachers lie on this machine. Empty: the recipe downloads its corpus
# into downloads/. Set a path here or in the environment, which wins.
export FSDD=${FSDD:-}               # Free Spoken Digit Dataset: the directory with recordings/
export LIBRISPEECH=${LIBRISPEECH:-} # the directory that holds LibriSpeech/, or LibriSpeech/ itself
export UNLABELLED=${UNLABELLED:-}   # speech without transcripts: any folder of audio files
export TEACHER=${TEACHER:-}         # speech foundation model: directory or Hugging Face name
