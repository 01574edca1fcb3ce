"""Official RWKV-7 weights become a block-diffusion model: --init_from=FILE.pth, and --data_path, a text.

Each layer gets a backward scan inside the block, a copy of its forward one, and low-rank adapters. At first
neither changes anything. The weights themselves stay as they are, and so does the network as an
autoregressive one, which the evaluation shows as block 1. With freeze_backbone=0 all learns: better blocks,
other next tokens.
"""
objective = "mixture"
direction = "block"
block_sizes = 4, 16
next_weight = 0.0           # next tokens are known already; with freeze_backbone=0 give it 0.5
predict = "next"            # a masked token is predicted where the one before it is, as pretraining had it
tokenizer = "rwkv"
freeze_backbone = True
adapter_rank = 32
recompute = True            # half of the memory, 1.3x the time
fusion = "gate"             # of the two scans: opens sooner than add, and leaves finished text alone
muon_lr = 0.02
adam_lr = 0.012
grad_clip = 1.0
