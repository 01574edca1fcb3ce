"""Texts with latents, Stage I:

    DATA_PATH=FOLDER python train.py config/latent.py, after python data.py latents --out=FOLDER
"""
objective = "sequential"
seq_len = 128
batch_size = 64
max_iters = 600
n_layer = 4
n_embd = 128
head_size = 32
tie_directions = True
ffn_shift = "both"
rank_w = 16
rank_a = 16
rank_v = 16
rank_g = 32
dim_ffn = 592
muon_lr = 0.028
eval_iters = 8
sequential_schedule = "stage1_coupling:1,l2t:2,t2l:1"
