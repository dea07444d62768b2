#!/usr/bin/env bash
# Many jobs from one command, and the commands that look at them: submit --from, jobs, status, drain, resume.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
fleet_begin "${DITFLEET_BUILD:?}"
ditfleet=$fleet_build/ditfleet
source "$DITFLEET_SOURCE/tests/expect.bash"
printed=$fleet/out
cd "$fleet"

# ---- files that are wrong: nothing is asked of Redis, and the line is named
job=(--model demo --width 48 --height 32 --num-inference-steps 1 --max-sequence-length 16)
to=(--output-url "http://127.0.0.1:9/{id}.png" --redis "unix://$fleet/none.sock")
# wrong TEXT NAME CONTENTS
wrong() {
  printf '%b' "$3" >"$2"
  expect 2 "$1" "$ditfleet" submit "${job[@]}" "${to[@]}" --from "$2"
}
expect 1 "absent.txt: No such file or directory" "$ditfleet" submit "${job[@]}" "${to[@]}" --from absent.txt
wrong "prompts: what it holds is not said; give --format txt, csv or jsonl" prompts "a ring\n"
wrong "empty.txt has no job" empty.txt "\n\n"
wrong "zero.txt is no text: it holds a zero byte" zero.txt 'a\0b\n'
wrong "bad.txt line 2: prompt is not UTF-8" bad.txt 'a ring\n\xff\xfe\n'
wrong "names.csv line 2: a job has no field promt" names.csv "promt\na ring\n"
wrong "cells.csv line 3: 1 cells; the first line names 2" cells.csv "prompt,seed\na,1\nb\n"
wrong "quote.csv line 2: a quoted cell does not end" quote.csv 'prompt\n"a ring\n'
wrong "after.csv line 2: after a quoted cell there is neither" after.csv 'prompt\n"a"b\n'
wrong "seed.csv line 4: seed" seed.csv 'prompt,seed\n"a\nb",1\nc,-1\n'
wrong "zero.csv line 2: width is 0; allowed: 16 to 16384" zero.csv "width\n0\n"
printf 'width\n64\n' >width.csv
wrong "json.jsonl line 2:" json.jsonl '{"prompt":"a"}\n{"prompt":\n'
wrong "list.jsonl line 1: not a JSON object" list.jsonl '[1]\n'
wrong "twice.jsonl line 1: duplicate" twice.jsonl '{"seed":1,"seed":2}\n'
wrong "bool.jsonl line 1: seed is neither text nor a number" bool.jsonl '{"seed":true}\n'
wrong "field.jsonl line 1: a job has no field size" field.jsonl '{"size":1}\n'
expect 2 "--from FILE" "$ditfleet" submit "${job[@]}" "${to[@]}" --format csv
expect 2 "it needs {id}" "$ditfleet" submit "${job[@]}" "${to[@]}" --from seed.csv --wait -o x.png
expect 2 "width.csv line 2: the job has no output" "$ditfleet" submit --model demo --from width.csv
printf 'a ring\n' >fine.txt
expect 3 "start it, or say by --redis" "$ditfleet" submit "${job[@]}" "${to[@]}" --from fine.txt

# ---- a fleet
fleet_redis
fleet_sink
fleet_supervisor "[group demo]
model = demo@1=$DITFLEET_SOURCE/ops/demo/model"
fleet_wait_ready 1
export DITFLEET_REDIS=$fleet_redis_url
to=(--output-url "$fleet_sink_url/{id}.png")

printf 'a red circle\n\na blue ring on a black background\r\na green star' >three.txt
expect 0 "3 succeeded, 0 failed" "$ditfleet" submit "${job[@]}" "${to[@]}" --from three.txt --id t --wait -o 'got-{id}.png'
for i in 1 2 3; do
  grep -q "^t-$i SUCCEEDED $fleet_sink_url/t-$i.png$" "$printed" || fail "nothing is said of t-$i"
  cmp "got-t-$i.png" "sink/t-$i.png" || fail "t-$i is not what was uploaded"
done
# The same once more is the same jobs: entries differ, results and attempts do not.
expect 0 '"id":"t-3"' "$ditfleet" submit "${job[@]}" "${to[@]}" --from three.txt --id t --wait --json
[[ $(wc -l <"$printed") == 3 ]] || fail "not one line of JSON a job"
expect 0 "attempts 1 begun" "$ditfleet" show t-2
expect 0 '"prompt":"a blue ring on a black background"' "$ditfleet" submit "${job[@]}" "${to[@]}" --from three.txt --id t --wait --json

printf '\xEF\xBB\xBFprompt,seed,width,id\r\n"two ""big"" hearts, red",7,64,csv-a\r\n"a\nring",,,csv-b\r\n' >rows.csv
expect 0 "2 succeeded" "$ditfleet" submit "${job[@]}" "${to[@]}" --from - --format csv --wait <rows.csv
"$ditfleet" show csv-a --json >"$printed"
check 'd["result"]["used"]["prompt"] == "two \"big\" hearts, red" and d["result"]["used"]["width"] == 64'
check 'd["result"]["used"]["seed"] in (7, "7")'
"$ditfleet" show csv-b --json >"$printed"
check 'd["result"]["used"]["prompt"] == "a\nring" and d["result"]["used"]["width"] == 48'

cat >mixed.jsonl <<EOF
{"id": "json-a", "prompt": "a ring", "guidance_scale": 2.5, "labels": {"team": "x"}, "negative_prompt": null}

{"id": "json-b", "prompt": "a star", "output": {"url": "$fleet_sink_url/other-{id}.png"}}
{"id": "json-c", "prompt": "a star", "model": "unicorn"}
EOF
expect 1 "json-c DEAD not_found" "$ditfleet" submit "${job[@]}" "${to[@]}" --from mixed.jsonl --wait
grep -q "^2 succeeded, 1 failed" "$printed" || fail "the total is not told: $(<"$printed")"
[[ -s sink/other-json-b.png ]] || fail "json-b has not its own output"

# Steps enough for 0.8 s of bars and 5 s of looking, whatever this build takes for one.
"$ditfleet" submit --model demo --width 256 --height 256 --num-inference-steps 3 "${to[@]}" --prompt x --wait --json >"$printed" 2>/dev/null
read -r bars long < <(python3 -c '
import json, sys
step = json.load(open(sys.argv[1]))["result"]["timing"]["denoise_seconds"] / 3
print(max(3, round(0.8 / step)), max(8, round(5 / (2.3 * step))))' "$printed")

# A bar for each job in work and one for all, no wider and no higher than the terminal.
script -qec "stty rows 10 cols 60; '$ditfleet' submit --model demo --width 256 --height 256 --num-inference-steps $bars ${to[*]@Q} --from three.txt --id bars --wait" bars >/dev/null
grep -q $'bars-1 .*denoise  \[' bars || fail "no bar of a job: $(cat -A bars)"
grep -q '\] 1/3, 0 failed, 1 in work, 1 waiting' bars || fail "no bar of all: $(cat -A bars)"
grep -q '3 succeeded, 0 failed' bars || fail "no end: $(cat -A bars)"

# Ctrl-C ends the waiting, and says how to look.
"$ditfleet" submit --model demo --width 384 --height 384 "${to[@]}" --from three.txt --num-inference-steps "$long" --id long --wait >"$printed" 2>&1 &
waiting=$!
running() { "$ditfleet" jobs --state running --json | grep -q long-1; }
fleet_wait supervisor 10 running
kill -INT $waiting
rc=0
wait $waiting || rc=$?
[[ $rc == 130 ]] && grep -q "stopped waiting; . of 3 jobs go on" "$printed" || fail "Ctrl-C: exit status $rc, $(<"$printed")"

# ---- jobs
expect 0 "long-3                   QUEUED     demo@1               default" "$ditfleet" jobs --state active
grep -q "long-1 .*denoise" "$printed" || fail "it is not told where long-1 is: $(<"$printed")"
grep -q t-1 "$printed" && fail "a job that ended is active"
"$ditfleet" jobs --json --limit 2 >"$printed"
check 'd["matched"] == 15 and [j["id"] for j in d["jobs"]][:1] == ["long-3"] and len(d["jobs"]) == 2'
"$ditfleet" jobs --json --limit 0 --model demo --state succeeded,running --newer 1h --older 0s >"$printed"
check '{j["id"] for j in d["jobs"]} >= {"t-1", "t-2", "t-3", "csv-a", "csv-b", "json-a", "json-b", "bars-1", "long-1"}'
check 'd["jobs"] == sorted(d["jobs"], key=lambda j: -j["created_ms"])'
expect 0 "0 of 0 jobs" "$ditfleet" jobs --tenant nobody
expect 0 "0 of 0 jobs" "$ditfleet" jobs --older 1d
expect 0 "0 of 0 jobs" "$ditfleet" jobs --model dem
expect 0 "1 of 1 jobs" "$ditfleet" jobs --state dead
grep -q "not_found" "$printed" || fail "the code of the refusal is missing"
expect 2 "--state sleeping is no state; allowed: active, queued" "$ditfleet" jobs --state queued,sleeping
expect 2 "--newer is soon; allowed: a time like 90s" "$ditfleet" jobs --newer soon

# ---- status, anew each second on a terminal
rm -f live
drawn() { # until it has told how fast the job goes, as soon as a step is done
  sleep 2.5
  for _ in $(seq 120); do
    grep -q "steps/s" live 2>/dev/null && break
    sleep 0.5
  done
  printf '\003'
}
drawn | script -fqec "stty rows 12 cols 70; exec '$ditfleet' status --config '$fleet/ditfleet.conf'" live >/dev/null ||
  fail "Ctrl-C did not end status well: $(cat -A live)"
[[ $(grep -c "^.*group demo: ready" live) -ge 2 ]] || fail "status is not drawn anew: $(cat -A live)"
grep -q "steps/s" live || fail "no steps a second: $(cat -A live)"
grep -q "pool demo@1: queued" live || fail "no pool: $(cat -A live)"
expect 0 "pool demo@1: queued" "$ditfleet" status --config "$fleet/ditfleet.conf"

# ---- drain: what runs is finished or given back, charged to nobody; the rest waits until the group is resumed
expect 1 "there is no group of this name" "$ditfleet" drain nobody --config "$fleet/ditfleet.conf"
expect 0 "demo stopped" "$ditfleet" drain --wait --config "$fleet/ditfleet.conf"
"$ditfleet" jobs --state queued --json >"$printed"
check 'd["matched"] >= 1'
expect 0 "long-3 CANCELLED" "$ditfleet" cancel long-3
expect 0 "group demo: stopped" "$ditfleet" status --config "$fleet/ditfleet.conf"
expect 0 '"groups":["demo"]' "$ditfleet" resume demo --json --config "$fleet/ditfleet.conf"
done_now() { "$ditfleet" jobs --state succeeded --limit 0 | grep '^long-2 ' >/dev/null; }
fleet_wait supervisor 150 done_now # two pictures, in a slow build
expect 0 "0 failed by its own error, 0 by the fleet's" "$ditfleet" show long-2
