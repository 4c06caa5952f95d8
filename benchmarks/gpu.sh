#!/usr/bin/env bash
# What a machine with a GPU is asked, in one command: the tests that need one, then the speed of a real shape with
# random weights, alone and over sixteen adapters. Results go to the folder that is named; PYTHON chooses the interpreter.
#
#     benchmarks/gpu.sh OUT            everything
#     SHAPE=llama-3.1-8b benchmarks/gpu.sh OUT
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:?usage: benchmarks/gpu.sh OUT}")
python=${PYTHON:-python3}
shape=${SHAPE:-qwen2.5-7b}
work=$(mktemp -d)
trap 'kill %?serve 2>/dev/null; rm -rf "$work"' EXIT
"$python" -c "import server.process, benchmarks.cli" || exit 1 # rather now than after waiting for a server
extra='{"ignore_eos": true, "temperature": 0}'

mapfile -t tests < <(grep -rl "mark\.gpu" tests)
"$python" -m pytest -m gpu -p no:cacheprovider --durations=10 "${tests[@]}" >"$out/tests.txt" 2>&1
echo "tests: exit $?: $(tail -1 "$out/tests.txt")"

"$python" -m benchmarks.make_model --shape "$shape" --out "$work" --adapters 16 --rank 16 --device cuda >"$work/log" 2>&1 ||
  { tail -5 "$work/log"; exit 1; }
"$python" -m benchmarks.decode_step "$work/model" --device cuda --batch 1 16 --profile >"$out/decode.txt" 2>&1
grep -E "^ *(batch|[0-9]+) +[0-9c]" "$out/decode.txt"
"$python" -m server serve "$work/model" --adapters-dir "$work/adapters" --served-model-name base >"$out/server.txt" 2>&1 &
bench=("$python" -m benchmarks.cli --wait 240 --model base --api completions --extra "$extra")
"${bench[@]}" --concurrency 1 --requests 50 --prompt-tokens 20 --output-tokens 16 --json "$out/first.json"
"${bench[@]}" --concurrency 1 --requests 6 --json "$out/one.json"
"${bench[@]}" --concurrency 16 --requests 64 --json "$out/sixteen.json"
"${bench[@]}" --concurrency 64 256 --requests 256 --json "$out/many.json"
"${bench[@]}" --concurrency 16 --adapters all --mix distinct --requests 32 --json "$out/adapters.json"
grep -v " request " "$out/server.txt" | tail -15
