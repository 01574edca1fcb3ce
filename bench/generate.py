"""python bench.py --suite=generate: what a block costs after 512 to 65,536 tokens of context."""
import functools
import itertools

import torch

import bench
import model as nets
from bench import alternated, attention_baseline, table

def block_networks(**sizes):
    """RWKV-7 in blocks of 32 tokens, and attention with as many parameters -> {name: ModelConfig}."""
    rwkv = nets.ModelConfig(block_size=32, direction="block", **sizes)
    return {"rwkv7, carried state": rwkv, "attention, cache": attention_baseline(rwkv, "block")}

def block_job(net, B, context):
    """A function that makes 32 tokens after `context`, by 8 calls and a clean pass; and its cache."""
    device, state = net.emb.weight.device, None
    text = torch.randint(net.mask_id, (B, context), device=device)
    mask = torch.full((B, 32), net.mask_id, device=device)
    for part in text.split(256, 1):        # attention scores of longer parts would fill the memory
        state = net(part, state=state, finished_text=True).state

    def block():
        for _ in range(8):
            net(mask, state=state)
        net(mask, state=state, finished_text=True)
    return block, state

@torch.inference_mode()
def suite():
    """From a carried state, from a cache, and with all read again in each of 8 calls."""
    configs = block_networks(n_layer=4, n_embd=256, head_size=64, vocab_size=256)
    networks = {name: nets.Denoiser(cfg).eval() for name, cfg in configs.items()}
    contexts = (64, 512) if bench.quick else (512, 4096, 16384, 65536)
    jobs, found = {}, {}
    for B, context in itertools.product((1, 2 if bench.quick else 32), contexts):
        if B > 1 and B * context > 32 * 4096:
            continue
        end = f"batch {B}, context {context}"
        whole = torch.randint(256, (B, context + 32))
        mine = {name: block_job(net, B, context) for name, net in networks.items()}
        mine["rwkv7, all again"] = functools.partial(networks["rwkv7, carried state"], whole), whole
        for name, (job, cache) in mine.items():
            jobs[f"{name}, {end}"] = job
            found[f"{name}, {end}"] = {"rows": B, "cache_bytes": nets.state_bytes(cache)}
    for name, ms in alternated(jobs, 19, seconds=2).items():
        run, ms = found[name], ms * (8 if "again" in name else 1)
        cache = run["cache_bytes"] / run["rows"] / 1024
        run |= {"ms": ms, "tokens_per_s": run["rows"] * 32e3 / ms, "KiB_per_row": cache}
    table("one block of 32 tokens, 8 calls", "network | ms per block | tokens/s | cache KiB per row",
          "{ms:.1f} | {tokens_per_s:.0f} | {KiB_per_row:.0f}", found)
    name, low, high = "rwkv7, carried state, batch 1, context", contexts[0], contexts[-1]
    ratio = found[f"{name} {high}"]["ms"] / found[f"{name} {low}"]["ms"]
    print(f"  {name}: a block at {high} tokens takes {ratio:.2f}x one at {low}")
    return {"rows": found, "ratio": ratio}
