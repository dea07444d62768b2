#!/usr/bin/env python3
"""Noise schedules of diffusers' FlowMatchEulerDiscreteScheduler, set up as FluxPipeline does, for
tests/unit/test_sampler.c.

    python make_sampler_goldens.py sampler.json
"""
import json
import sys

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

DEV = dict(use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
OTHER = dict(use_dynamic_shifting=True, base_shift=0.3, max_shift=0.9, base_image_seq_len=64, max_image_seq_len=1000)
STATIC = dict(use_dynamic_shifting=False, shift=3.0)
SCHNELL = dict(use_dynamic_shifting=False, shift=1.0)

# scheduler_config.json, steps, image tokens, and the shift that a job puts in place of the model's schedule
CASES = [
    (DEV, 20, 256, None), (DEV, 4, 143, None), (DEV, 28, 4096, None), (DEV, 3, 1, None), (DEV, 50, 1024, None),
    (DEV, 1, 256, None), (OTHER, 7, 500, None), ({**OTHER, "time_shift_type": "linear"}, 5, 500, None),
    (SCHNELL, 4, 1024, None), (SCHNELL, 1, 256, None), (STATIC, 9, 256, None), (DEV, 6, 256, 1.0), (DEV, 6, 256, 2.5),
    (DEV, 6, 256, 0.25), (SCHNELL, 1, 256, 3.0),
]


def schedule(config, steps, tokens, shift):
    used = config if shift is None else {"use_dynamic_shifting": False, "shift": shift}
    s = FlowMatchEulerDiscreteScheduler(**used)
    mu = calculate_shift(tokens, s.config.base_image_seq_len, s.config.max_image_seq_len, s.config.base_shift, s.config.max_shift)
    s.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return {"config": {"_class_name": type(s).__name__, **config}, "steps": steps, "image_tokens": tokens, "shift": shift,
            "sigmas": s.sigmas.double().tolist(), "timesteps": s.timesteps.double().tolist()}


with open(sys.argv[1], "w") as f:
    f.write("[\n" + ",\n".join(json.dumps(schedule(*case)) for case in CASES) + "\n]\n")
