#!/usr/bin/env python3
"""Times the reference pipeline (diffusers, float32, CPU) on one job: the peer of tests/bench/run.

    python reference.py --model DIR --threads 2 --repeat 5 [--width 256 --height 256 --steps 20]

Prints one JSON object: seconds of each run after one warm-up, median, loading, and peak memory of the process.
"""
import argparse
import json
import resource
import statistics
import time


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", required=True)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--repeat", type=int, default=5)
    ap.add_argument("--width", type=int, default=256)
    ap.add_argument("--height", type=int, default=256)
    ap.add_argument("--steps", type=int, default=20)
    args = ap.parse_args()

    start = time.perf_counter()
    import diffusers
    import torch

    torch.set_num_threads(args.threads)
    pipe = diffusers.FluxPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    loaded = time.perf_counter() - start

    def once():
        begin = time.perf_counter()
        pipe("a red circle above a blue square on a white background", width=args.width, height=args.height,
             num_inference_steps=args.steps, guidance_scale=3.5, max_sequence_length=128,
             generator=torch.Generator("cpu").manual_seed(1))
        return time.perf_counter() - begin

    with torch.inference_mode():
        once()
        seconds = [once() for _ in range(args.repeat)]
    print(json.dumps({
        "name": f"diffusers {diffusers.__version__}, torch {torch.__version__}",
        "seconds": [round(s, 4) for s in seconds],
        "median": round(statistics.median(seconds), 4),
        "load_seconds": round(loaded, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }))


if __name__ == "__main__":
    main()
