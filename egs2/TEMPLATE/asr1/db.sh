# shellcheck shell=bash
# Where corpora and teachers lie on this machine. Empty, or the word downloads: the recipe
# downloads its corpus into downloads/. UNLABELLED and TEACHER are no corpora to download, and
# digits/ssl1 needs both. Set a path here or in the environment, which wins.
export FSDD=${FSDD:-}               # Free Spoken Digit Dataset: the directory with recordings/
export LIBRISPEECH=${LIBRISPEECH:-} # the directory that holds LibriSpeech/, or LibriSpeech/ itself
export TEDLIUM3=${TEDLIUM3:-}       # the directory that holds TEDLIUM_release-3/, or that itself
export AN4=${AN4:-}                 # the directory that holds an4/ (of an4_sphere.tar.gz), or that itself
export AISHELL=${AISHELL:-}         # the directory that holds data_aishell/
export COMMONVOICE=${COMMONVOICE:-} # cv-corpus-.../, or a directory with one; never downloaded
export UNLABELLED=${UNLABELLED:-}   # speech without transcripts: any folder of audio files
export TEACHER=${TEACHER:-}         # speech foundation model: directory or Hugging Face name
