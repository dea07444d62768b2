#!/usr/bin/env python3
"""The peer of `ditfleet bench --compare`: the same transformer in compiled PyTorch, with random weights.

    python3 reference_gpu.py --config DIR/transformer/config.json --width 1024 --height 1024 --steps 28 \
        --text-tokens 512 --precision bf16|fp8|int8|fp16|fp32 --device cuda|cpu [--ranks N] [--runs N]

diffusers' FluxTransformer2DModel where diffusers is installed, else the plain one below, which is the same function.
On a GPU: torch.compile block by block, which is ready in a minute (--whole and --mode max-autotune-no-cudagraphs take
many and gain little), and a CUDA graph of one step, attention by cuDNN where it can;
fp8: the blocks' linear layers by torch._scaled_mm, a factor for each row of activations and each output channel; int8,
which it has not in one pass, is answered by fp8. Several ranks, a GPU each, are processes of this script that share the
picture by DeepSpeed-Ulysses through NCCL (gloo on a CPU), with the plain transformer.

Prints one line of JSON when it is warm, {"name": ...} or {"missing": why}. Then, for every line "run" on stdin (or N
times), one loop of all steps, synchronised after each: {"step_ms": [...], "loop_s": ..., "peak_bytes": ...}.
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time


def say(**fields):
    print(json.dumps(fields), flush=True)


try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    say(missing=f"python3 has no PyTorch ({error})")
    sys.exit(0)

RANKS = 1
PRECISIONS = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "int8": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---- FLUX.1's transformer, as worker/models/flux.c computes it


def sinusoid(t, dim=256):
    half = dim // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x, rope):  # x (1, heads, rows, dim); rope (rows, dim / 2, 2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def mlp(d_in, d):
    return nn.Sequential(nn.Linear(d_in, d), nn.SiLU(), nn.Linear(d, d))


class Heads(nn.Module):
    """Queries, keys and values of one stream."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.norm_q, self.norm_k = nn.RMSNorm(d // heads, eps=1e-6), nn.RMSNorm(d // heads, eps=1e-6)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_q(q), self.norm_k(k), v


def to_each_rank(t):  # (ranks, ...): what each rank gets -> what each sent
    return exchanges.all_to_all_single(t.contiguous(), None, None, dist.group.WORLD)


def attend(q, k, v, rope):
    """(1, heads, rows, dim) each -> (1, rows, heads * dim). Where rows are dealt to ranks, each takes some heads of all
    rows meanwhile (DeepSpeed-Ulysses, Jacobs et al. 2023)."""
    q, k = rotate(q, rope), rotate(k, rope)
    if RANKS == 1:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    mine = torch.stack([q[0], k[0], v[0]]).unflatten(1, (RANKS, -1)).transpose(0, 1)  # (ranks, 3, heads / ranks, rows, dim)
    q, k, v = to_each_rank(mine).permute(1, 2, 0, 3, 4).flatten(2, 3).unsqueeze(1)
    heads = F.scaled_dot_product_attention(q, k, v)[0]
    rows = to_each_rank(heads.unflatten(1, (RANKS, -1)).transpose(0, 1))  # (ranks, heads / ranks, rows, dim)
    return rows.flatten(0, 1).transpose(0, 1).flatten(1).unsqueeze(0)


def modulate(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Stream(nn.Module):
    """One side, text or image, of a double block."""

    def __init__(self, d, heads):
        super().__init__()
        self.mod = nn.Linear(d, 6 * d)
        self.heads = Heads(d, heads)
        self.out, self.up, self.down = nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def start(self, x, c):
        self.chunks = self.mod(c)[:, None].chunk(6, dim=-1)
        return self.heads(modulate(x, self.chunks[1], self.chunks[0]))

    def finish(self, x, attended):
        _, _, gate, shift, scale, gate_mlp = self.chunks
        x = x + gate * self.out(attended)
        return x + gate_mlp * self.down(F.gelu(self.up(modulate(x, scale, shift)), approximate="tanh"))


class Double(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.text, self.image = Stream(d, heads), Stream(d, heads)

    def forward(self, text, image, c, rope):
        both = zip(self.text.start(text, c), self.image.start(image, c))
        attended = attend(*(torch.cat(pair, dim=2) for pair in both), rope)
        n = text.shape[1]
        return self.text.finish(text, attended[:, :n]), self.image.finish(image, attended[:, n:])


class Single(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.mod, self.heads = nn.Linear(d, 3 * d), Heads(d, heads)
        self.up, self.out = nn.Linear(d, 4 * d), nn.Linear(5 * d, d)

    def forward(self, x, c, rope):
        shift, scale, gate = self.mod(c)[:, None].chunk(3, dim=-1)
        normed = modulate(x, scale, shift)
        attended = attend(*self.heads(normed), rope)
        return x + gate * self.out(torch.cat([attended, F.gelu(self.up(normed), approximate="tanh")], dim=-1))


class Flux(nn.Module):
    def __init__(self, config):
        super().__init__()
        heads = config["num_attention_heads"]
        d, channels = heads * config["attention_head_dim"], config["in_channels"]
        self.embed_image, self.embed_text = nn.Linear(channels, d), nn.Linear(config["joint_attention_dim"], d)
        self.time, self.pooled = mlp(256, d), mlp(config["pooled_projection_dim"], d)
        self.guidance = mlp(256, d) if config.get("guidance_embeds") else None
        self.transformer_blocks = nn.ModuleList(Double(d, heads) for _ in range(config["num_layers"]))
        self.single_transformer_blocks = nn.ModuleList(Single(d, heads) for _ in range(config["num_single_layers"]))
        self.mod, self.out = nn.Linear(d, 2 * d), nn.Linear(d, channels)

    def forward(self, x, text, pooled, t, guidance, rope):
        kind = x.dtype
        c = self.time(sinusoid(t * 1000).to(kind)) + self.pooled(pooled)
        if self.guidance is not None:
            c = c + self.guidance(sinusoid(guidance * 1000).to(kind))
        c, x, text = F.silu(c), self.embed_image(x), self.embed_text(text)
        for block in self.transformer_blocks:
            text, x = block(text, x, c, rope)
        n, x = text.shape[1], torch.cat([text, x], dim=1)
        for block in self.single_transformer_blocks:
            x = block(x, c, rope)
        scale, shift = self.mod(c)[:, None].chunk(2, dim=-1)
        return self.out(modulate(x[:, n:], scale, shift))


# ---- fp8


class Linear8(nn.Module):
    """A linear layer of E4M3 by E4M3: a factor for each row of x and for each output channel."""

    def __init__(self, linear):
        super().__init__()
        w = linear.weight.detach().float()
        factor = w.abs().amax(dim=1, keepdim=True) / 448
        self.register_buffer("w", (w / factor).to(torch.float8_e4m3fn))
        self.register_buffer("factor", factor.t().contiguous())
        self.bias = linear.bias

    def forward(self, x):
        rows = x.flatten(0, -2)
        factor = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 448
        small = (rows.float() / factor).clamp(-448, 448).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(small, self.w.t(), scale_a=factor, scale_b=self.factor, bias=self.bias,
                             out_dtype=x.dtype, use_fast_accum=True)
        return y.unflatten(0, x.shape[:-1])


def quantise(module):
    """Every linear layer of the blocks, but for those that make modulations."""
    for name, child in module.named_children():
        if name in ("norm1", "norm1_context", "norm", "mod"):
            continue
        if isinstance(child, nn.Linear):
            setattr(module, name, Linear8(child))
        else:
            quantise(child)


# ---- one step, and the loop


def positions(config, text, rows, columns, device):
    """Position ids (text + rows * columns, 3): text at the origin, image token (y, x) at (0, y, x)."""
    ids = torch.zeros(text + rows * columns, 3, device=device)
    ids[text:, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
    ids[text:, 2] = torch.arange(columns, device=device).repeat(rows)
    return ids


def turns(config, ids):
    parts = []
    for axis, dim in enumerate(config["axes_dims_rope"]):
        frequency = 1 / 10000 ** (torch.arange(0, dim, 2, device=ids.device).double() / dim)
        parts.append(ids[:, axis, None].double() * frequency)
    angles = torch.cat(parts, dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def build(config, args, kind):
    """The model and its version in words; call(x, text, pooled, t, guidance) predicts the velocity of this rank's rows."""
    rows, columns, text = args.height // 16, args.width // 16, args.text_tokens
    ids = positions(config, text, rows, columns, args.device)
    ids = torch.cat([share(ids[:text], args), share(ids[text:], args)])
    torch.manual_seed(1)
    torch.set_default_dtype(kind)
    try:
        import diffusers
    except ImportError:
        diffusers = None
    if args.plain or args.ranks > 1:
        diffusers = None
    with torch.device(args.device):
        model = diffusers.FluxTransformer2DModel.from_config(config) if diffusers else Flux(config)
    torch.set_default_dtype(torch.float32)
    model = model.to(device=args.device, dtype=kind).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(1 if p.dim() == 1 and name.endswith("weight") else 0, 0.02)
    if args.precision == "fp8":
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            quantise(block)
    if not args.eager:
        how = {"mode": args.mode, "dynamic": False}
        if args.whole:
            model.compile(**how)
        else:  # one compilation serves all blocks of a kind
            for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
                block.compile(**how)
    if diffusers:
        def call(x, text_embeds, pooled, t, guidance):
            return model(hidden_states=x, encoder_hidden_states=text_embeds, pooled_projections=pooled, timestep=t,
                         guidance=guidance if config.get("guidance_embeds") else None, txt_ids=ids[:text],
                         img_ids=ids[text:], return_dict=False)[0]
        return call, f"diffusers {diffusers.__version__}"
    rope = turns(config, ids)
    return lambda x, text_embeds, pooled, t, guidance: model(x, text_embeds, pooled, t, guidance, rope), "plain"


def share(t, args, dim=0):
    """This rank's rows of t."""
    n = t.shape[dim] // args.ranks
    return t.narrow(dim, args.rank * n, n)


class Loop:
    def __init__(self, config, args):
        kind, device = PRECISIONS[args.precision], args.device
        self.steps, self.cuda, self.graph = args.steps, device == "cuda", None
        call, self.version = build(config, args, kind)
        tokens = (args.height // 16) * (args.width // 16)
        make = lambda *shape: torch.randn(*shape, device=device).to(kind)
        self.noise = share(make(1, tokens, config["in_channels"]), args, 1)
        self.x = self.noise.clone()
        text = share(make(1, args.text_tokens, config["joint_attention_dim"]), args, 1)
        pooled = make(1, config["pooled_projection_dim"])
        self.t, self.dt = torch.ones(1, device=device), torch.zeros(1, device=device)
        guidance = torch.full((1,), 3.5, device=device)

        def step():
            v = call(self.x, text, pooled, self.t, guidance)
            self.x.copy_(self.x.float() + self.dt * v.float())

        self.step = step
        for _ in range(3):
            step()
        if self.cuda:
            self.capture(step)
        self.run()

    def capture(self, step):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL's watchdog calls CUDA meanwhile
            step()
        self.step = self.graph.replay

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def run(self):
        sigmas = [1 - i / self.steps for i in range(self.steps + 1)]
        self.x.copy_(self.noise)
        self.sync()
        times, begin = [], time.perf_counter()
        for i in range(self.steps):
            start = time.perf_counter()
            self.t.fill_(sigmas[i])
            self.dt.fill_(sigmas[i + 1] - sigmas[i])
            self.step()
            self.sync()
            times.append((time.perf_counter() - start) * 1e3)
        return {"step_ms": times, "loop_s": time.perf_counter() - begin,
                "peak_bytes": torch.cuda.max_memory_allocated() if self.cuda else 0}


# ---- several ranks


class Others:
    """The processes of the other ranks, which do all that this one does."""

    def __init__(self, args):
        self.directory = tempfile.TemporaryDirectory(prefix="peer-")
        args.meeting = os.path.join(self.directory.name, "meeting")
        command = [sys.executable, *sys.argv, "--meeting", args.meeting]
        self.processes = [subprocess.Popen([*command, "--rank", str(r)], stdin=subprocess.PIPE,
                                           stdout=subprocess.DEVNULL, text=True) for r in range(1, args.ranks)]

    def run(self):
        for p in self.processes:
            p.stdin.write("run\n")
            p.stdin.flush()

    def end(self):
        for p in self.processes:
            p.kill()
            p.wait()
        self.directory.cleanup()


def leave(others):
    """At once: NCCL's own end would wait for the others."""
    others.end()
    sys.stdout.flush()
    os._exit(0)


def meet(args):
    global RANKS, dist, exchanges
    import torch.distributed as dist
    import torch.distributed._functional_collectives as exchanges
    RANKS = args.ranks
    if args.device == "cuda":
        torch.cuda.set_device(args.rank)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", init_method=f"file://{args.meeting}",
                            rank=args.rank, world_size=args.ranks)


def attention_by_cudnn():
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel(order, set_priority=True)
    except (ImportError, TypeError):  # an older PyTorch chooses by itself
        import contextlib
        return contextlib.nullcontext()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--config", required=True)
    ap.add_argument("--width", type=int, required=True)
    ap.add_argument("--height", type=int, required=True)
    ap.add_argument("--steps", type=int, required=True)
    ap.add_argument("--text-tokens", type=int, default=512)
    ap.add_argument("--precision", choices=PRECISIONS, default="bf16")
    ap.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    ap.add_argument("--eager", action="store_true", help="do not compile")
    ap.add_argument("--plain", action="store_true", help="the plain transformer even where diffusers is installed")
    ap.add_argument("--whole", action="store_true", help="compile the model as one, not block by block")
    ap.add_argument("--mode", default="default", help="of torch.compile")
    ap.add_argument("--runs", type=int, help="loops to run at once, without waiting to be told")
    ap.add_argument("--ranks", type=int, default=1, help="processes, a GPU each, that make the picture together")
    ap.add_argument("--rank", type=int, default=0, help="which one this is; the first starts the others")
    ap.add_argument("--meeting", help="the file where the others find it")
    args = ap.parse_args()
    if args.precision == "int8":
        args.precision = "fp8"
    args.eager |= args.device == "cpu"
    with open(args.config, encoding="utf-8") as f:
        config = {k: v for k, v in json.load(f).items() if not k.startswith("_")}
    rows = args.height // 16 * (args.width // 16)
    if any(n % args.ranks for n in (rows, args.text_tokens, config["num_attention_heads"])):
        return say(missing=f"{args.ranks} ranks: the peer deals rows and heads evenly")
    gpus = torch.cuda.device_count() if args.device == "cuda" else args.ranks
    if gpus < args.ranks:
        return say(missing=f"PyTorch {torch.__version__} sees {gpus} GPUs of {args.ranks}")
    if args.ranks == 1 or args.rank > 0:
        return serve(config, args)
    others = Others(args)
    signal.signal(signal.SIGTERM, lambda *_: leave(others))
    try:
        serve(config, args, others)
    except Exception:
        others.end()
        raise
    leave(others)


def serve(config, args, others=None):
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    if args.ranks > 1:
        meet(args)
    with torch.inference_mode(), attention_by_cudnn():
        try:
            loop = Loop(config, args)
        except torch.cuda.OutOfMemoryError:
            return say(missing="the GPU has no memory left for the peer beside ditfleet")
        how = "eager" if args.eager else f"compiled {'whole' if args.whole else 'by blocks'} ({args.mode})"
        say(name=f"PyTorch {torch.__version__}, {loop.version} transformer, {how}"
                 f"{', CUDA graph' if loop.graph else ''}{f', Ulysses {args.ranks}' if others else ''}, {args.precision}")
        orders = range(args.runs) if args.runs else (line for line in sys.stdin if line.strip() == "run")
        for _ in orders:
            if others and not args.runs:
                others.run()
            say(**loop.run())


if __name__ == "__main__":
    main()
