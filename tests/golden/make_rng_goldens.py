#!/usr/bin/env python3
"""Normal numbers of torch itself, for tests/unit/test_rng.c.

    python make_rng_goldens.py rng.json

Replaces in rng.json the generators that this torch and machine have, and keeps the others: torch 2.13 and later
have cpu-f32, cpu-bf16, cpu-f16; torch 2.12 and earlier the two older CPU ones; a CUDA GPU has cuda. Each case holds
up to 64 of its numbers, spread over the ends and the middle, and the sum over all of i % 7 * |x_i|.
"""
import json
import os
import sys

import torch

SEEDS = [0, 1, 1234567, 2**32 - 1, 2**32 + 7, 2**40 + 5, 2**64 - 1]
SIZES = [*range(1, 41), 1000, 16384, 65541]
CUDA_SIZES = [1, 5, 40, 255, 257, 1000, 16384, 65541, 300000, 4 * 270336 + 17]  # 270336: an H200's threads


def cases(kind, device, dtype, sizes):
    for i, n in enumerate(sizes):
        seed = SEEDS[i % len(SEEDS)]
        x = torch.randn(n, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype).double().cpu()
        index = sorted({*range(min(n, 20)), *range(max(0, n - 20), n), *range(0, n, n // 24 + 1)})
        case = {"kind": kind, "seed": str(seed), "n": n, "index": index, "value": x[index].tolist(),
                "sum": (x.abs() * (torch.arange(n) % 7)).sum().item()}
        if device == "cuda":
            case["sm_count"] = torch.cuda.get_device_properties(0).multi_processor_count
        yield case


def main(path):
    new = tuple(int(v) for v in torch.__version__.split(".")[:2]) >= (2, 13)
    made = []
    if new:
        made += cases("cpu-f32", "cpu", torch.float32, SIZES)
    suffix = "" if new else "-torch-2.12"
    made += cases("cpu-bf16" + suffix, "cpu", torch.bfloat16, SIZES)
    made += cases("cpu-f16" + suffix, "cpu", torch.float16, SIZES)
    if torch.cuda.is_available():
        made += cases("cuda", "cuda", torch.float32, CUDA_SIZES)
    kinds = {c["kind"] for c in made}
    kept = [c for c in json.load(open(path)) if c["kind"] not in kinds] if os.path.exists(path) else []
    with open(path, "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(c) for c in kept + made) + "\n]\n")
    print(f"torch {torch.__version__}: made {sorted(kinds)}, kept {sorted({c['kind'] for c in kept})}")


if __name__ == "__main__":
    main(sys.argv[1])
