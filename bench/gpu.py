"""python bench.py --suite=gpu: what a GPU does, each part a function of what the GPU itself can do and of the
device."""
import contextlib
import functools
import itertools
import json
import os
import statistics
import time
from dataclasses import replace

import torch

import bench
import diffusion
import model as nets
import wkv_cuda
from bench import attention_baseline, chosen, from_file, parameters, table, where, write

wkv = from_file("wkv")

def relative_errors(f, reference, names, x):
    """Of outputs and gradients of f against the reference in float64 on the same, perhaps rounded, inputs."""
    exact = [z.detach().double().requires_grad_() for z in x]
    y, wanted = wkv.outputs(f(*x)), wkv.outputs(reference(*exact))
    g = torch.Generator(x[0].device).manual_seed(1)
    grads = [torch.randn(z.shape, generator=g, device=z.device).to(z.dtype) for z in y]
    found = [*y, *torch.autograd.grad(y, x, grads)]
    wanted = [*wanted, *torch.autograd.grad(wanted, exact, [z.double() for z in grads])]
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, found, wanted)}

def parity(limits, device):
    """Relative errors of the kernels, every output, every gradient. ValueError if one is too large."""
    found, T, normal = {}, 50 if bench.quick else 200, functools.partial(torch.randn, device=device)
    dtypes = torch.float32, torch.bfloat16
    for dtype, N, every in itertools.product(dtypes, wkv_cuda.HEAD_SIZES, (None, 5, 16)):
        x = wkv.recurrence_inputs(2, T + 1, 3, N, dtype, device)
        s0, c = 0.3 * normal(2, 3, N, N), (0.3 * normal(x[0].shape)).to(dtype)
        x += [s0.requires_grad_(), c.requires_grad_()]
        ops = (functools.partial(op, every=every) for op in (wkv_cuda.wkv7, wkv_cuda.wkv7_loop))
        name = f"wkv7 N={N}{f' every={every}' if every else ''} {str(dtype)[6:]}"
        found[name] = relative_errors(*ops, "y s dr dw dk dv da db ds0 dc".split(), x)
    x = [torch.rand(2, 48, device=device), normal(2, 48), normal(2, T, 48), normal(2, T, 48)]
    ops = wkv_cuda.biwkv, wkv_cuda.biwkv_loop
    found["biwkv float32"] = relative_errors(*ops, "y dw du dk dv".split(), [z.requires_grad_() for z in x])
    worst = {name: dict(largest=max(row.values()), of=max(row, key=row.get)) for name, row in found.items()}
    table("relative error against float64, allowed 1e-5 (float32) and 2e-2 (bfloat16)",
          "kernel | largest | of", "{largest:.1e} | {of}", worst)
    allowed = {name: 2e-2 if "bfloat16" in name else 1e-5 for name in worst}
    if bad := [name for name, row in worst.items() if not row["largest"] <= allowed[name]]:
        raise ValueError("the kernels are wrong on this GPU, so that nothing else is measured: "
                         f"{', '.join(bad)}; WKV_IMPL=torch does without them")
    return found

def median_ms(f, device):
    """Median milliseconds of f(), which is called once before."""
    times = []
    for _ in range(3 if bench.quick else 12):
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])

def limits(device):
    """What the GPU itself does: bytes/s of a copy, FLOP/s of a matrix product in bfloat16."""
    size, n = (2**20, 512) if bench.quick else (2**30, 8192)
    x, y = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    moved = 2 * size / median_ms(lambda: y.copy_(x), device) * 1e3
    flops = 2 * n**3 / median_ms(lambda: a @ a, device) * 1e3
    print(f"\n  this GPU copies {moved / 1e9:.0f} GB/s and multiplies {flops / 1e12:.1f} TFLOP/s in bfloat16")
    return {"bytes_per_s": moved, "flops": flops}

class Official(torch.autograd.Function):
    """RWKV-LM's pair of operators `forward` and `backward`, op, as a function of r, w, k, v, a, b."""
    @staticmethod
    def forward(ctx, op, *x):
        B, T, H, N = x[0].shape
        y, sa = torch.empty_like(x[0]), torch.empty_like(x[0], dtype=torch.float32)
        s = sa.new_empty(B, H, T // 16, N, N)
        op.forward(*x, y, s, sa)
        ctx.op = op
        ctx.save_for_backward(*x, s, sa)
        return y

    @staticmethod
    def backward(ctx, dy):
        *x, s, sa = ctx.saved_tensors
        grads = [torch.empty_like(z) for z in x]
        ctx.op.backward(*x, dy.contiguous(), s, sa, *grads)
        return None, *grads

def official_kernels(folder):
    """RWKV-LM's own training kernels from a checkout -> {name: function of wkv7's r, w, k, v, a, b}: head
    size 64, T a multiple of 16, bfloat16; their w goes through a sigmoid. ValueError if a file is missing."""
    from torch.utils.cpp_extension import load
    flags = ["-O3", "--use_fast_math", "--extra-device-vectorization", "-D_N_=64", "-D_CHUNK_LEN_=16"]
    found, cuda = {}, os.path.join(folder, "RWKV-v7", "train_temp", "cuda")
    for name, variant in {"rwkv7_clampw": "", "rwkv7_clampw_v3": "_for_h100"}.items():
        sources = [os.path.join(cuda, f"{name}{variant}.cu"), os.path.join(cuda, f"{name}.cpp")]
        if missing := [f for f in sources if not os.path.isfile(f)]:
            raise ValueError(f"rwkv_lm={folder}: there is no {missing[0]}: "
                             "give the folder of a checkout of github.com/BlinkDL/RWKV-LM")
        load(name, sources, is_python_module=False, extra_cuda_cflags=flags)
        found[name] = functools.partial(Official.apply, getattr(torch.ops, name))
    return found

def recurrences(device):
    """{name: function of wkv7's inputs}: ours, fla's where it is installed, RWKV-LM's from a checkout."""
    found = {wkv_cuda.backend(device): lambda *x: wkv_cuda.wkv7(*x)[0]}
    try:                  # what fla's chunk_rwkv7 calls; its own arguments differ between versions
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
        fla = functools.partial(chunk_dplr_delta_rule, scale=1.0, output_final_state=False)
        found["fla"] = lambda r, w, k, v, a, b: fla(q=r, k=k, v=v, a=a, b=b, gk=w)[0]
    except ImportError as e:
        print(f"  fla's chunk_rwkv7 is not measured: {e} (pip install flash-linear-attention)")
    if bench.rwkv_lm:
        return found | official_kernels(bench.rwkv_lm)
    print("  RWKV-LM's kernels are not measured: give a checkout of github.com/BlinkDL/RWKV-LM as --rwkv_lm")
    return found

def recurrence(limits, device):
    """Forward for inference, forward and backward for training. Bytes are those that must move at least
    (inputs, output, gradients, what forward keeps), FLOPs 9 N per channel forward and 19 N backward."""
    B, H, N = (1, 2, 64) if bench.quick else (8, 32, 64)
    impls, found = recurrences(device), {}
    for T in (64, 128) if bench.quick else (512, 1024, 2048, 4096, 8192, 16384):
        x = wkv.recurrence_inputs(B, T, H, N, torch.bfloat16, device)
        dy, size = torch.randn_like(x[0]), x[0].numel()
        kept = 4 + 4 * N / 16                  # bytes per element of the output
        for name, f in impls.items():
            forward = torch.no_grad()(functools.partial(f, *x))
            ways = {"forward": (forward, 14, 9),
                    "forward+backward": (lambda: torch.autograd.grad(f(*x), x, dy), 40 + 2 * kept, 28)}
            for way, (job, moved, flops) in ways.items():
                per_s = size / median_ms(job, device) * 1e3
                speed = dict(ms=size / per_s * 1e3, bytes_per_s=moved * per_s, flops=flops * N * per_s)
                shares = {f"{key}_share": speed[key] / limit for key, limit in limits.items()}
                found[f"{name}, {way}, T={T}"] = speed | shares
    table(f"wkv7 at (B,T,H,N) = ({B},T,{H},{N}), bfloat16",
          "back end | ms | B/s | of a copy | FLOP/s | of a matrix product",
          "{ms:.3f} | {bytes_per_s:.0G} | {bytes_per_s_share:.1%} | {flops:.2T} | {flops_share:.1%}", found)
    return found

def training_step(cfg, batch, T, device, recompute):
    """(milliseconds, bytes of memory) of a step: masked tokens, AdamW, bfloat16 products, torch.compile."""
    with torch.device(device):
        net = nets.Denoiser(cfg)
        x, masked = torch.randint(cfg.vocab_size, (batch, T)), torch.rand(batch, T) < 0.5
    torch.compiler.reset()                 # what has been compiled for other networks counts towards a limit
    nets.compile_blocks(net)
    net.recompute = recompute
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16):
            net(diffusion.mask_tokens(x, masked, net.mask_id), targets=x).nats.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step()
    torch.accelerator.reset_peak_memory_stats()
    return median_ms(step, device), torch.accelerator.max_memory_allocated()

def training(size, T, limits, device):
    """Networks of about 124 M or 1.5 B parameters, rows of T tokens. MFU is against the matrix product."""
    V, N, (L, C, tokens) = 50304, 64, {"124M": (12, 768, 16384), "1.5B": (24, 2048, 4096)}[size]
    if bench.quick:
        N, L, C, tokens, T = 16, 2, 64, 128, 64
    two_way = nets.ModelConfig(n_layer=L, n_embd=C, head_size=N, vocab_size=V, tie_embeddings=True,
                               direction="bidirectional")
    causal, attention, found = replace(two_way, direction="causal"), attention_baseline(two_way), {}
    networks = {"causal": causal, "causal, recompute": causal, "bidirectional": two_way,
                "attention baseline": attention}
    for name, cfg in networks.items():
        torch.accelerator.empty_cache()
        started = time.perf_counter()
        try:
            ms, memory = training_step(cfg, tokens // T, T, device, "recompute" in name)
        except torch.OutOfMemoryError:
            print(f"  {size} {name}: {tokens // T} x {T} tokens do not fit this GPU", flush=True)
            continue
        speed = tokens / ms * 1e3
        mfu = 3 * nets.flops_per_token(cfg, T) * speed / limits["flops"]
        found[name] = dict(parameters=parameters(cfg), ms=ms, tokens_per_s=speed, memory_bytes=memory,
                           GiB=memory / 2**30, mfu=mfu, s=time.perf_counter() - started)
        print(f"  {size} {name}: {ms:.1f} ms, {memory / 2**30:.1f} GiB", flush=True)
    table(f"a training step on {tokens // T} x {T} tokens, {size}",
          "network | parameters | ms | tokens/s | GiB | MFU | s with compilation",
          "{parameters:.0M} | {ms:.1f} | {tokens_per_s:.0f} | {GiB:.1f} | {mfu:.1%} | {s:.0f}", found)
    return found

@torch.inference_mode()
def generation(limits, device):
    """Blocks of 32 after 1024 tokens, 124 M parameters, bfloat16 products."""
    L, C, N, V, context = (2, 64, 16, 256, 64) if bench.quick else (12, 768, 64, 50304, 1024)
    generate = from_file("generate")
    networks = generate.block_networks(n_layer=L, n_embd=C, head_size=N, vocab_size=V, tie_embeddings=True)
    ways, found = ("", ", replayed") if device == "cuda" else ("",), {}
    for (name, cfg), way in itertools.product(networks.items(), ways):
        with torch.device(device):
            net = nets.Denoiser(cfg).eval()
        if way:
            net.forward = nets.Replayed(net.forward)
        for B in (1, 2 if bench.quick else 32):
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                ms = median_ms(generate.block_job(net, B, context)[0], device)
            found[f"{name}{way}, batch {B}"] = dict(ms=ms, tokens_per_s=B * 32 / ms * 1e3)
    table("one block of 32 tokens", "network | ms | tokens/s", "{ms:.1f} | {tokens_per_s:.0f}", found)
    return found

def suite():
    """The parts asked for, each kept as soon as it is measured, beside what is on file for this GPU."""
    if not torch.cuda.is_available():
        raise ValueError("suite=gpu measures a GPU, and torch sees none "
                         "(nvidia-smi, CUDA_VISIBLE_DEVICES, a CUDA build of torch)")
    if reason := wkv_cuda.build("cuda"):
        raise ValueError(f"nothing to measure: {reason}")
    parts = {"parity": parity, "wkv7": recurrence, "generation": generation}
    for size, T in itertools.product(("124M", "1.5B"), (1024, 4096)):
        parts[f"training {size} {T}"] = functools.partial(training, size, T)
    found = {"processor": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    with contextlib.suppress(OSError), open(where("gpu", **found)) as f:
        found = json.load(f) | found
    found["limits"] = limits("cuda")
    for name in chosen(parts):
        found[name] = parts[name](found["limits"], "cuda")
        write("gpu", found)
    return found
