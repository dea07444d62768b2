#!/usr/bin/env bash
# ditfleet bench on the CPU: invented weights and a real model, every part, its JSON, its refusals, the peer's protocol.
# bench.sh cuda: what the precisions of a GPU cost, on the demo model's trained weights.
set -euo pipefail
ditfleet=${DITFLEET_BUILD:?}/ditfleet
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work
source "${DITFLEET_SOURCE:?}/tests/expect.bash"
under_test=("$ditfleet" bench)
printed=$work/out

small=(--width 64 --height 64 --num-inference-steps 4 --max-sequence-length 16 --threads 2)
demo=(--architecture demo "${small[@]}" --json)
model=${DITFLEET_SOURCE:?}/ops/demo/model

# Relative L2 of the latents after 28 steps, and of the first prediction, medians of 24 pictures: bounds of the precisions.
# A single picture may take another path early, and end far away. Measured: kernels/NOTES.md.
if [[ ${1:-cpu} == cuda ]]; then
  "$ditfleet" generate --device cuda --model "$model" "${small[@]}" --quiet -o "$work/x.png" >"$work/out" 2>&1 ||
    { echo "skipped: no GPU here: $(<"$work/out")" && exit 77; }
  pictures=("a red circle on a yellow background" "two yellow hearts on a green background"
    "a blue star on a white background" "a green square on a black background"
    "a large orange circle on a purple background" "three red triangles on a blue background")
  for bound in "fp8 0.05 0.03" "int8 0.03 0.015" "bf16 0.015 0.01" "fp16 0.003 0.003"; do
    read -r precision latents prediction <<<"$bound"
    : >"$work/errors"
    for seed in {1..24}; do
      expect 0 '"errors":' --model "$model" --device cuda --what error --num-inference-steps 28 --precision "$precision" \
        --prompt "${pictures[(seed - 1) % 6]}" --seed "$seed" --width 256 --height 256 --max-sequence-length 128 --json
      check "len(d['errors']) == 28 and d['errors'][0]['prediction'] > 0"
      check "d['rounded_twice'] == ('$precision' == 'fp8')"
      cat "$printed" >>"$work/errors"
    done
    python3 -c "
import json, statistics
runs = [json.loads(line)['errors'] for line in open('$work/errors')]
first, last = [r[0]['prediction'] for r in runs], [r[27]['latents'] for r in runs]
print('$precision: first prediction %.3f %% (at most %.3f), latents after 28 steps %.3f %% (at most %.3f, above 5 %% in %d of 24)' %
      (100 * statistics.median(first), 100 * max(first), 100 * statistics.median(last), 100 * max(last), sum(e > 0.05 for e in last)))
raise SystemExit(not (statistics.median(first) < $prediction and statistics.median(last) < $latents))" ||
      fail "$precision is beyond its bounds: $prediction and $latents"
  done
  exit 0
fi

expect 0 '"bound":' "${demo[@]}" --repeat 2
check "len(d['images']) == 3 and d['step_ms']['count'] == 2"
check "all(i['loop_s'] > 0 and i['text_s'] > 0 and i['decode_s'] == 0 and i['step_ms']['count'] == 4 for i in d['images'])"
check "0 < d['step_ms']['min'] <= d['step_ms']['median'] <= d['step_ms']['max']"
check "all(v > 0 for v in d['ceilings'].values())"
check "all(c['flops'] > 0 and c['bytes'] > 0 and c['floor_ms'] > 0 for c in d['cost'].values())"
check "d['cost']['step']['attention_flops'] == 4 * 32 * 32 * 256 * 6"
check "d['memory']['weights'] > 1e7 and d['memory']['activations'] > 0 and d['memory']['process_peak'] > 0"
check "d['device'] == 'cpu' and d['precision'] == 'fp32' and not d['rounded_twice'] and d['verdict']['bound'] in ('compute', 'bandwidth')"
expect 0 '"t5_ms":{' "${demo[@]}" --what image --repeat 1
check "all(i['decode_s'] > 0 for i in d['images']) and d['t5_ms']['median'] > 0 and d['clip_ms']['median'] > 0"
expect 0 '"images":[]' "${demo[@]}" --what text
check "d['t5_ms']['count'] == 10"
expect 0 '"decode_s"' "${demo[@]}" --what vae --repeat 1
check "d['num_inference_steps'] == 1 and d['images'][1]['decode_s'] > 0"
expect 0 '"first_step_s"' "${demo[@]}" --what start
check "0 < d['loaded_s'] < d['first_step_s'] < 60"
expect 2 "compares with float32" "${demo[@]}" --what error
expect 0 "verdict" --model "$model" "${small[@]}" --repeat 1
ls "$work" | grep ditfleet-bench >/dev/null && fail "the architecture's directory is still there"

# ---- an architecture as files: all of it or nothing, and a model as soon as the tokenizers are there
written=$work/written
expect 0 "missing: tokenizer/vocab.json, tokenizer/merges.txt, tokenizer_2/spiece.model; copy" --architecture demo \
  --write-checkpoint "$written"
expect 1 "$written/tokenizer" --model "$written" "${small[@]}"
cp -r "$model/tokenizer" "$model/tokenizer_2" "$written"
expect 0 '"first_step_s"' --model "$written" "${small[@]}" --json --what start
check "0 < d['loaded_s'] < d['first_step_s'] < 60 and d['memory']['weights'] > 1e7"
"$ditfleet" generate --model "$written" --prompt "a red circle" "${small[@]}" -o "$work/noise.png" >"$work/out" 2>&1 ||
  fail "generate from a written checkpoint: $(<"$work/out")"
[[ -s $work/noise.png ]] || fail "no picture from a written checkpoint"
before=$(cd "$written" && find . -type f -exec sha256sum {} + | sort)
expect 2 "holds scheduler_config.json already; nothing is overwritten" --architecture demo --write-checkpoint "$written"
[[ $(cd "$written" && find . -type f -exec sha256sum {} + | sort) == "$before" ]] || fail "a model was overwritten"
mkdir "$work/beside" && cp -r "$model/tokenizer" "$model/tokenizer_2" "$work/beside"
expect 0 '"missing":[]' --architecture demo --write-checkpoint "$work/beside" --json
check "d['architecture'] == 'demo' and d['bytes'] > 1e7 and d['seconds'] > 0"
mkdir "$work/half" && cp -r "$model/tokenizer" "$work/half"
for dir in full half; do # room for the text encoders alone
  (trap '' XFSZ && ulimit -f 4000 && expect 1 "cannot be written (File too large)" --architecture demo \
    --write-checkpoint "$work/$dir") || exit 1
done
[[ ! -e $work/full && $(ls "$work/half") == tokenizer ]] ||
  fail "half a checkpoint was left: $(find "$work"/{full,half})"
expect 1 "nowhere/at/all: cannot be made" --architecture demo --write-checkpoint "$work/nowhere/at/all"
expect 2 "it may be flux.1-dev, flux.1-schnell, demo" --architecture sdxl --write-checkpoint "$work/sdxl"
[[ ! -e $work/sdxl ]] || fail "a directory was left for an architecture that is not known"
expect 2 "--write-checkpoint writes an architecture: it goes with --architecture NAME" --write-checkpoint "$work/none"
expect 2 "--write-checkpoint writes an architecture: it goes with --architecture NAME" --model "$model" \
  --write-checkpoint "$work/none"

# ---- the peer: a script that answers as the real one does, one that has no PyTorch, one that fails
cat >"$work/peer.py" <<'PEER'
import json, sys
print('a library says hello')
print(json.dumps({"name": "a peer of {} steps, {} ranks".format(*(sys.argv[sys.argv.index(o) + 1] for o in ("--steps", "--ranks")))}), flush=True)
for line in sys.stdin:
    print(json.dumps({"step_ms": [2.0, 1.0, 3.0], "loop_s": 0.5}), flush=True)
PEER
expect 0 '"name":"a peer of 4 steps, 1 ranks"' "${demo[@]}" --repeat 1 --compare --peer "$work/peer.py"
check "d['peer']['step_ms'] == {'median': 2, 'min': 1, 'max': 3, 'count': 6} and d['peer']['loop_s'] == 0.5"
expect 0 "a peer of 4 steps, 2 ranks; loop 0.500 s" --architecture demo "${small[@]}" --repeat 1 --ranks 2 --compare \
  --peer "$work/peer.py"
echo 'print("{\"missing\": \"python3 has no PyTorch\"}")' >"$work/none.py"
expect 0 "none: python3 has no PyTorch" --architecture demo "${small[@]}" --repeat 1 --compare --peer "$work/none.py"
echo 'raise SystemExit("it broke")' >"$work/broken.py"
expect 0 "none: it broke" --architecture demo "${small[@]}" --repeat 1 --compare --peer "$work/broken.py"
expect 0 "none: it broke" --architecture demo "${small[@]}" --repeat 1 --ranks 2 --compare --peer "$work/broken.py"
echo 'print("{\"name\": \"mute\"}", flush=True)' >"$work/mute.py"
expect 3 "the peer gave no times" --architecture demo "${small[@]}" --repeat 1 --compare --peer "$work/mute.py"
sed '1i import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)' "$work/peer.py" >"$work/stays.py"
echo 'time.sleep(100)' >>"$work/stays.py"
begin=$SECONDS
expect 0 "a peer of 4 steps" --architecture demo "${small[@]}" --repeat 1 --ranks 2 --compare --peer "$work/stays.py"
((SECONDS - begin < 30)) || fail "a peer that does not end holds up the command"

# ---- refusals
expect 2 "one of --architecture NAME and --model DIR is needed"
expect 2 "one of --architecture NAME and --model DIR is needed" --architecture demo --model "$model"
expect 2 "architecture sdxl: it may be flux.1-dev, flux.1-schnell, demo" --architecture sdxl
expect 1 "model_index.json" --model "$work"
expect 2 "--what all: it may be step, image, text, vae, start or error" --architecture demo --what all
expect 2 "device tpu: it may be cpu or cuda" --architecture demo --device tpu
expect 2 "--device dry: it may be cpu or cuda" --architecture demo --device dry
expect 2 "--compare: the peer runs steps" --architecture demo --what text --compare
expect 2 "--repeat takes a whole number from 1 to" --architecture demo --repeat 0
expect 2 "use --repeat" --architecture demo --num-images 2
expect 2 "--peer $work/nowhere: cannot be read" --architecture demo "${small[@]}" --compare --peer "$work/nowhere"
expect 2 "--memory-budget is of a GPU" --architecture demo --memory-budget 24
expect 2 "width 40: this model takes multiples of 16" --architecture demo --width 40
expect 1 "precision bf16: on cpu there is fp32" --architecture demo --precision bf16
echo "bench: all passed"
