"""python bench.py --suite=score --ckpt=out/ckpt.pt --data_path=pairs.jsonl: log-likelihoods of continuations,
in the contract of lm-evaluation-harness. A line: {"context": "...", "continuation": "..."}; with "choices" in
place of a continuation, and "answer", the number of the right one, also accuracy.

Exact from next tokens where the network knows them; else exact for the sampler that reveals one token at a
time in a fixed order (DUEL, arXiv 2603.01367); or, if asked for, the variational bound."""
import math

import torch
from tqdm import tqdm

import bench
import data
import diffusion
import model as nets
from bench import table

WAYS = "next", *diffusion.ORDERS, "bound"
NUMBERS = 1 << 26       # logits in memory at a time

class Scorer:
    """A checkpoint of train.py. way: a row of WAYS, "" for the best it can. draws: of the bound."""

    def __init__(self, path, way="", draws=16):
        saved = nets.load_checkpoint(path)
        if "tokenizer" not in saved:
            raise ValueError(f"{path} has no tokenizer: give a checkpoint of train.py")
        trained, self.draws = saved["config"], draws
        self.net = nets.from_pretrained(path, saved).eval()
        self.tokenizer, self.T = data.Tokenizer(**saved["tokenizer"]), trained["seq_len"]
        name = trained["objective"] or "masked_mean"
        objective = diffusion.OBJECTIVES[name]
        if objective.gaussian or objective.latents or name == "task":
            raise ValueError(f"{path} was trained with objective={name}: give a network of masked text, "
                             "blocks or next tokens")
        cfg = diffusion.trained_with(trained | {"objective": name})
        reads_on = name in ("ar", "mixture") or cfg.next_weight or self.net.cfg.adapter_rank
        self.way = way or ("next" if reads_on else "confidence")
        if self.way not in WAYS or self.way == "next" and not reads_on or name == "ar" and self.way != "next":
            raise ValueError(f"likelihood={way!r} is not for objective={name}: choose one of "
                             f"{', '.join(WAYS[1:] if name != 'ar' else WAYS[:1])}")
        if self.way == "next":
            objective = diffusion.NextToken
        elif name == "mixture":                    # as blocks of the largest size, 0 = the row
            size = min(cfg.block_sizes) and max(cfg.block_sizes)
            self.net.cfg.block_size, objective = size or self.T, diffusion.Blocks
        self.objective = objective(cfg, self.net.cfg)
        self.endless = self.way == "next" or issubclass(objective, diffusion.Blocks)

    def encoded(self, context, continuation):
        """-> ids, how many of them are the context's. Spaces at its end belong to the continuation."""
        kept = context.rstrip()
        continuation = context[len(kept):] + continuation
        ids = self.tokenizer.encode(kept + continuation).tolist()
        given = min(len(self.tokenizer.encode(kept)), max(0, len(ids) - 1))
        cut = 0 if self.endless else max(0, len(ids) - self.T)
        return ids[cut:], max(0, given - cut)

    @torch.no_grad()
    def pairs(self, pairs):
        """[(context, continuation)] -> [(log p(continuation | context), is it what greedy decoding gives?)];
        for the bound, a lower bound, and None."""
        rows = [self.encoded(*pair) for pair in pairs]
        order, found, at = sorted(range(len(rows)), key=lambda i: len(rows[i][0])), [None] * len(rows), 0
        bar = tqdm(total=len(rows), desc="scored", unit="pair", disable=None)
        while at < len(order):
            longest, n = len(rows[order[at]][0]), 1
            while at + n < len(order):             # rows of like length, as many as memory allows
                longest = len(rows[order[at + n]][0])
                if (n + 1) * longest * self.net.cfg.vocab_size > NUMBERS:
                    break
                n += 1
            mine = order[at:at + n]
            for i, result in zip(mine, self.batch([rows[i] for i in mine])):
                found[i] = result
            at += n
            bar.update(n)
        bar.close()
        return found

    def batch(self, rows):
        """[(ids, given)] -> [(log p, greedy)]."""
        lengths = torch.tensor([max(1, len(ids)) for ids, _ in rows])
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids or [0]) for ids, _ in rows], batch_first=True)
        place = torch.arange(x.shape[1])
        asked = (place >= torch.tensor([given for _, given in rows])[:, None]) & (place < lengths[:, None])
        asked &= torch.tensor([bool(ids) for ids, _ in rows])[:, None]
        count, generator = asked.sum(1).clamp_min(1), data.generator(1234, 0, 2)
        greedy = [None] * len(rows)
        if self.way == "next":
            logp = self.objective.through(self.net, x, asked, lengths).logits.double().log_softmax(-1)
            nats = -(logp.gather(-1, x[..., None])[..., 0] * asked).sum(1)
            greedy = ((logp.argmax(-1) == x) | ~asked).all(1).tolist()
        elif self.way == "bound":
            draws = [self.objective.bound(self.net, x, generator, asked, lengths) for _ in range(self.draws)]
            nats = torch.stack(draws).mean(0).nan_to_num(0.0) * count
        else:
            nats, greedy = self.objective.in_order(self.net, x, self.way, generator, asked, lengths)
            nats, greedy = nats.nan_to_num(0.0) * count, greedy.tolist()
        return list(zip((-nats).tolist(), greedy))

    @torch.no_grad()
    def generate(self, context, options):
        """The text after `context`; options: until, max_gen_toks, temperature, as the harness gives them."""
        n = options.get("max_gen_toks", 64)
        ids = torch.from_numpy(self.tokenizer.encode(context).astype("int64"))
        ids = ids if self.endless else ids[-max(1, self.T - n):]
        x = torch.cat([ids, torch.full((n,), self.net.mask_id)])[None]
        sampler = "ar" if self.way == "next" else "block" if self.endless else "confidence"
        y = self.objective.fill(self.net, x, x != self.net.mask_id, data.generator(1, 0, 3), sampler,
                                temperature=options.get("temperature", 0.0), eot=self.tokenizer.eot_id)
        text = self.tokenizer.decode(y[0, len(ids):].tolist())
        stops = options.get("until") or []
        ends = [*([stops] if isinstance(stops, str) else stops)]
        if self.tokenizer.eot_id is not None:
            ends.append(self.tokenizer.decode([self.tokenizer.eot_id]))
        return text[:min([at for at in map(text.find, ends) if at >= 0], default=len(text))]

def read_pairs(path):
    """-> [(context, [continuations], number of the right one or None)]."""
    def use(found):
        if not isinstance(found, dict) or not isinstance(found.get("context"), str):
            raise ValueError("it has no context")
        choices = found.get("choices", [found.get("continuation")])
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError("it has no continuation, and no list of choices, that are texts")
        answer = found.get("answer")
        if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
            raise ValueError(f"answer={answer!r} is not the number of one of {len(choices)} choices")
        return found["context"], choices, answer
    if not path or not data.is_jsonl(path):
        raise ValueError(f"data_path={path!r}: give a .jsonl file with lines such as "
                         '{"context": "...", "continuation": "..."}')
    with data.reading(path, 'give lines such as {"context": "...", "continuation": "..."}'):
        lines = [(i, line) for i, line in enumerate(data.lines_of(path), 1) if line.strip()]
    return [data.record(path, line, f"line {i}", use) for i, line in lines]

def suite():
    scorer, rows = Scorer(bench.ckpt, bench.likelihood), read_pairs(bench.data_path)
    flat = [(context, choice) for context, choices, _ in rows for choice in choices]
    found, scored, right = iter(scorer.pairs(flat)), [], []
    for context, choices, answer in rows:
        mine = [next(found) for _ in choices]
        scored.append({"context": context, "choices": choices, "logp": [p for p, _ in mine],
                       "greedy": [greedy for _, greedy in mine]})
        if answer is not None:
            best = max(range(len(choices)), key=lambda i: mine[i][0])
            longest = max(range(len(choices)), key=lambda i: mine[i][0] / max(1, len(choices[i].encode())))
            right.append((best == answer, longest == answer))
    chars, logp = sum(len(c) for _, c in flat), sum(p for row in scored for p in row["logp"])
    summary = {"pairs": len(flat), "way": scorer.way, "logp": logp / len(flat)}
    summary["bits_per_char"] = -logp / chars / math.log(2)
    greedy = [g for row in scored for g in row["greedy"] if g is not None]
    if greedy:
        summary["greedy"] = sum(greedy) / len(greedy)
    if right:
        summary["acc"], summary["acc_norm"] = (sum(z) / len(right) for z in zip(*right))
    table(f"{bench.ckpt} on {bench.data_path}",
          "likelihood | pairs | log p | bits per character | greedy | acc | acc_norm",
          "{pairs} | {logp:.3f} | {bits_per_char:.4f} | {greedy:.3f} | {acc:.3f} | {acc_norm:.3f}",
          {scorer.way: summary})
    return {"summary": summary, "rows": scored}
