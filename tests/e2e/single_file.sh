#!/usr/bin/env bash
# A transformer in one file, by its authors' names as ComfyUI keeps it or diffusers': the pictures are those of the folder.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/tests/expect.bash"
ditfleet=${DITFLEET_BUILD:?}/ditfleet
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
printed=$dir/out
demo=$DITFLEET_SOURCE/ops/demo/model

# All of the demo model but the transformer's weights: only their configuration.
mkdir -p "$dir/model/transformer"
for part in model_index.json scheduler tokenizer tokenizer_2 text_encoder text_encoder_2 vae; do
  ln -s "$demo/$part" "$dir/model/$part"
done
cp "$demo/transformer/config.json" "$dir/model/transformer/"
job=(--prompt "two yellow hearts on a green background" --seed 3 --width 96 --height 64 --num-inference-steps 3
  --max-sequence-length 32)
say() { printf '%s\n' "$1" >"$dir/model/ditfleet.json"; }

# same A B: of two PNG files the pixels; what is written beside them tells of the files they came from
same() {
  python3 -c '
import sys
first, second = ((data := open(path, "rb").read())[data.index(b"IDAT"):] for path in sys.argv[1:])
sys.exit(first != second)' "$1" "$2"
}
expect 0 "" "$ditfleet" generate --model "$demo" "${job[@]}" -o "$dir/folder.png"
say '{}'
expect 1 "neither diffusion_pytorch_model.safetensors" "$ditfleet" generate --model "$dir/model" "${job[@]}" -o "$dir/x.png"
say '{"transformer": "one.safetensors"}'
expect 1 "model/one.safetensors: cannot be opened" "$ditfleet" generate --model "$dir/model" "${job[@]}" -o "$dir/x.png"
say '{"transformer": 5}'
expect 2 "ditfleet.json: transformer must be the path of a file" "$ditfleet" generate --model "$dir/model" "${job[@]}" -o "$dir/x.png"
say '{"transformer": "../one.safetensors"}'
for form in original comfyui diffusers f32; do
  python3 "$DITFLEET_SOURCE/tests/e2e/single_file.py" "$demo" $form "$dir/one.safetensors"
  expect 0 "" "$ditfleet" generate --model "$dir/model" "${job[@]}" -o "$dir/$form.png"
  same "$dir/folder.png" "$dir/$form.png" || fail "$form: another picture than the folder's"
done
expect 0 "F32" "$ditfleet" model verify "$dir/model"
# By ranks that have the blocks in parts, too.
python3 "$DITFLEET_SOURCE/tests/e2e/single_file.py" "$demo" original "$dir/one.safetensors"
expect 0 "" "$ditfleet" generate --model "$dir/model" "${job[@]}" --ranks 2 --weights sharded -o "$dir/sharded.png"
same "$dir/folder.png" "$dir/sharded.png" || fail "sharded: another picture than the folder's"

# wrong FORM TEXT
wrong() {
  python3 "$DITFLEET_SOURCE/tests/e2e/single_file.py" "$demo" "$1" "$dir/one.safetensors"
  expect 1 "one.safetensors: $2" "$ditfleet" model verify "$dir/model"
}
wrong missing "tensor double_blocks.1.txt_attn.qkv.weight [768, 256] is missing"
wrong extra "tensor single_blocks.0.lora_A.weight [1, 2] is no part of this model"
wrong shape "tensor single_blocks.3.linear1.bias has shape [1785] but the configuration implies [1792]"
wrong other "no FLUX.1 transformer: it has neither img_in.weight"
wrong fp8 "tensor img_in.weight has dtype F8_E4M3; F32, BF16 and F16 can be used"
