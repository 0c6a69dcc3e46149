#!/usr/bin/env bash
# Builds and runs the emulated kernel tests:   tests/emulated/run.sh [plain|address|thread ...] [-- test ...]
# Without arguments all three builds and all tests. Exit code 0: all passed; 1: a test failed; 70: a build failed;
# 77: this machine lacks cmake or a sanitizer that was asked for, and the output says so.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=${THESEUS_EMULATED_BUILD:-$here/../../build/emulated}
mkdir -p "$build"
builds=() tests=()
while (($#)); do
    if [ "$1" = -- ]; then shift; tests=("$@"); break; fi
    builds+=("$1"); shift
done
((${#builds[@]})) || builds=(plain address thread)
command -v cmake >/dev/null || { echo "emulated: the tests were NOT run: no cmake on this machine"; exit 77; }

# Prints a command prefix with which a sanitized program runs here; fails with the reason where none does.
probe() {
    local folder; folder=$(mktemp -d)
    trap 'rm -rf "$folder"' RETURN
    echo 'int main() { return 0; }' >"$folder/probe.cpp"
    if ! "${CXX:-c++}" "$1" "$folder/probe.cpp" -o "$folder/probe" 2>"$folder/why"; then
        echo "${CXX:-c++} cannot build with $1: $(head -1 "$folder/why")"; return 1
    fi
    "$folder/probe" 2>"$folder/why" && return 0
    # Newer kernels randomise more of the address space than an older ThreadSanitizer can map.
    if setarch -R "$folder/probe" 2>/dev/null; then echo "setarch -R"; return 0; fi
    echo "a program built with $1 does not run here: $(head -1 "$folder/why")"; return 1
}

code=0
for kind in "${builds[@]}"; do
    prefix=""
    case $kind in
        plain) ;;
        address) flag=-fsanitize=address,undefined ;;
        thread) flag=-fsanitize=thread ;;
        *) echo "emulated: no build is called $kind; plain, address, thread"; exit 2 ;;
    esac
    if [ "$kind" != plain ] && ! prefix=$(probe "$flag"); then
        echo "emulated: the $kind tests were NOT run: $prefix"
        [ $code = 0 ] && code=77
        continue
    fi
    cmake -S "$here" -B "$build/$kind" -DSANITIZE="$kind" -DCMAKE_CXX_COMPILER="${CXX:-c++}" >"$build/$kind.log" 2>&1 &&
        cmake --build "$build/$kind" --parallel "${MAX_JOBS:-2}" >>"$build/$kind.log" 2>&1 ||
        { echo "emulated: the $kind build failed"; cat "$build/$kind.log"; exit 70; }
    for binary in "$build/$kind"/test_*; do
        [ -x "$binary" ] && [ -f "$binary" ] || continue
        wanted=()
        for test in ${tests[@]+"${tests[@]}"}; do
            if "$binary" --list | grep -qx "$test"; then wanted+=("$test"); fi
        done
        ((${#tests[@]} == 0 || ${#wanted[@]})) || continue
        echo "--- $kind $(basename "$binary")"
        # UBSan and TSan must end a failing program with an error; leaks are not what is tested here.
        TSAN_OPTIONS="exitcode=66 halt_on_error=1 ${TSAN_OPTIONS:-}" ASAN_OPTIONS="detect_leaks=0 ${ASAN_OPTIONS:-}" \
            $prefix "$binary" ${wanted[@]+"${wanted[@]}"} ||
            { echo "emulated: $kind $(basename "$binary") FAILED"; code=1; }
    done
done
exit $code
