#!/usr/bin/env bash
# Run a part of the tests as other machines would: with fewer vector instructions, other products, other numbers of
# threads, another locale, in a folder with an odd name, and not as root.
#
#     tests/machines.sh            (make test-machines; PYTHON names the Python that has torch and pytest)
#
# Exit status 1 when any of them fails; a table of all at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
PART=(tests/test_reference.py tests/test_rnn.py tests/test_qrnn.py tests/test_products.py tests/test_splitcross.py)
SCRIPTS=(tests/test_systems.py tests/test_files.py tests/test_finetune.py tests/test_bad_input.py)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
odd="$scratch/AWD LSTM für alle"
mkdir "$odd"
tar --exclude=./.venv --exclude=./.git --exclude=./data --exclude=./runs -cf - . | tar -xf - -C "$odd"
chmod -R a+rwX "$scratch"
failed=0
table=""

# under NAME COMMAND ...: run it, and note in the table how it ended
under() {
    local name=$1 start=$SECONDS result=passed output
    shift
    echo "== $name"
    output=$("$@" 2>&1) || { result=FAILED; failed=1; echo "$output" | tail -n 60; }
    table+=$(printf '%-62s %s in %4d s: %s' "$name" "$result" $((SECONDS - start)) "$(grep -E "passed|failed" <<< "$output" | tail -n 1)")$'\n'
}
tests() { "$PYTHON" -m pytest -p no:cacheprovider "$@"; }
at() { (cd "$odd" && "$@"); }

for setting in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx512 MKL_CBWR=COMPATIBLE \
        ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 OMP_NUM_THREADS=4 \
        "ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41"; do
    under "$setting" env $setting "$PYTHON" -m pytest -p no:cacheprovider "${PART[@]}"
done
under "a path with spaces and an umlaut" at tests "${SCRIPTS[@]}"
under "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0" \
    env LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$PYTHON" -m pytest -p no:cacheprovider "${SCRIPTS[@]}"
if [ "$(id -u)" = 0 ]; then
    # without root's rights; as another user where that one can run this Python
    drop=(setpriv --reuid=65534 --regid=65534 --clear-groups)
    "${drop[@]}" test -x "$(realpath "$PYTHON")" || drop=(setpriv --bounding-set=-all --inh-caps=-all)
    under "not root" at env HOME="$scratch" "${drop[@]}" \
        "$PYTHON" -m pytest -p no:cacheprovider --basetemp="$scratch/nobody" "${SCRIPTS[@]}"
fi
echo
printf '%s' "$table"
exit $failed
