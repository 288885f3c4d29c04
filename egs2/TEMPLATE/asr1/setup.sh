#!/usr/bin/env bash
# Make the directory of a recipe for a corpus of your own.
#
#   egs2/TEMPLATE/asr1/setup.sh NAME
#
# makes egs2/NAME/asr1 with run.sh, conf/, local/, README.md and links to what all recipes
# share. It runs as it is on folders of audio files with transcripts; its local/data.py is
# short, and is the one file to rewrite for a corpus that looks different. There are no
# options.
[ -n "${BASH_VERSION-}" ] || { echo "error: $0 needs bash: bash $0" >&2; exit 1; }
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 1
}

case ${1-} in
    -h | --help)
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
esac
[ $# -eq 1 ] || die "usage: $0 NAME (see --help)"
name=$1
[[ ${name} =~ ^[a-z][a-z0-9_]*$ ]] ||
    die "NAME ${name}: write small letters, digits and underscores, a letter first"
variable=${name^^}
[ -z "${!variable+set}" ] ||
    die "NAME ${name}: the recipe would find its corpus by \$${variable}, which is set" \
        "already: choose another NAME, or unset it"

template=$(dirname "$(readlink -f "$0")")
recipe=${template%/TEMPLATE/asr1}/${name}/asr1
[ ! -e "${recipe}" ] || die "${recipe} exists already: choose another NAME, or remove it"

new=${recipe}.new.$$ # it appears when it is complete
mkdir -p "${new}"
trap 'rm -rf "${new}"' EXIT
cp -R "${template}/new/." "${new}/"
find "${new}" -type f -exec sed -i.orig -e "s/@NAME@/${name}/g" \
    -e "s/@VARIABLE@/${variable}/g" {} +
find "${new}" -name '*.orig' -delete
chmod +x "${new}/run.sh" "${new}/local/data.py"
for shared in path.sh db.sh; do
    ln -s "../../TEMPLATE/asr1/${shared}" "${new}/${shared}"
done
ln -s ../../../TEMPLATE/asr1/data.sh "${new}/local/data.sh"
mv "${new}" "${recipe}"
echo "$(date '+%Y-%m-%dT%H:%M:%S') (setup.sh) made ${recipe}"
echo "Next: cd ${recipe}, set ${variable} to your corpus (README.md says how it has to lie), ./run.sh"
