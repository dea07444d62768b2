"""The demo model's transformer in one file, with its authors' names and in other ways: single_file.py MODEL FORMAT OUT.

FORMAT: original, comfyui (the same behind a prefix), diffusers, f32 (original, in float32), and files that are wrong: missing,
extra, shape, other, fp8. The names are those of the FLUX.1 repository; what is fused is put together from diffusers' parts."""
import json
import pathlib
import re
import struct
import sys

LAYERS = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
    **{f"time_text_embed.{theirs}_embedder.linear_{i}": f"{ours}_in.{layer}_layer" for theirs, ours in
       (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")) for i, layer in ((1, "in"), (2, "out"))},
}
DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2", "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
FUSED = {
    "transformer_blocks": {"img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
                           "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]},
    "single_transformer_blocks": {"linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]},
}


def read(folder):
    tensors = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        size, = struct.unpack("<Q", data[:8])
        for name, info in json.loads(data[8:8 + size]).items():
            if name != "__metadata__":
                start, end = (8 + size + at for at in info["data_offsets"])
                tensors[name] = [info["dtype"], info["shape"], data[start:end]]
    return tensors


def write(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            f.write(data)


def stacked(parts):
    return [parts[0][0], [sum(p[1][0] for p in parts), *parts[0][1][1:]], b"".join(p[2] for p in parts)]


def original(tensors):
    left, out = dict(tensors), {}

    def move(theirs, ours):
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in left:
                out[f"{ours}.{'scale' if ours.endswith('_norm') else kind}"] = left.pop(f"{theirs}.{kind}")

    for theirs, ours in LAYERS.items():
        move(theirs, ours)
    for kind in ("weight", "bias"):  # shift before scale
        dtype, shape, data = out[f"final_layer.adaLN_modulation.1.{kind}"]
        half = len(data) // 2
        out[f"final_layer.adaLN_modulation.1.{kind}"] = [dtype, shape, data[half:] + data[:half]]
    for block in sorted({m.group(0) for m in (re.match(r"\w+\.\d+", name) for name in left) if m}):
        kind, number = block.split(".")
        there = f"{'double' if kind == 'transformer_blocks' else 'single'}_blocks.{number}"
        for theirs, ours in (DOUBLE if kind == "transformer_blocks" else SINGLE).items():
            move(f"{block}.{theirs}", f"{there}.{ours}")
        for ours, parts in FUSED[kind].items():
            for what in ("weight", "bias"):
                out[f"{there}.{ours}.{what}"] = stacked([left.pop(f"{block}.{part}.{what}") for part in parts])
    assert not left, left.keys()
    return out


def wide(tensor):
    dtype, shape, data = tensor
    assert dtype == "BF16"
    out = bytearray(2 * len(data))
    out[2::4], out[3::4] = data[0::2], data[1::2]
    return ["F32", shape, bytes(out)]


def main(model, form, path):
    theirs = read(f"{model}/transformer")
    ours = original(theirs)
    if form == "comfyui":
        ours = {f"model.diffusion_model.{name}": t for name, t in ours.items()}
    if form == "diffusers":
        ours = theirs
    if form == "f32":
        ours = {name: wide(t) for name, t in ours.items()}
    if form == "missing":
        del ours["double_blocks.1.txt_attn.qkv.weight"]
    if form == "extra":
        ours["single_blocks.0.lora_A.weight"] = ["BF16", [1, 2], b"\0\0\0\0"]
    if form == "shape":
        name = "single_blocks.3.linear1.bias"
        dtype, shape, data = ours[name]
        ours[name] = [dtype, [shape[0] - 7], data[:-14]]
    if form == "other":
        ours = {"down_blocks.0.weight": ["BF16", [1], b"\0\0"]}
    if form == "fp8":
        dtype, shape, data = ours["img_in.weight"]
        ours["img_in.weight"] = ["F8_E4M3", shape, data[::2]]
    write(path, ours)


if __name__ == "__main__":
    main(*sys.argv[1:])
