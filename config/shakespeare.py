"""Characters of a text by masked diffusion, one scan a layer in turn forward and backward, on a CPU:

    DATA_PATH=input.txt python train.py config/shakespeare.py
"""
tokenizer = "char"
seq_len = 128
batch_size = 64
max_iters = 600
n_layer = 4
n_embd = 128
head_size = 32
direction = "alternate"
tie_directions = True       # for other directions: both scans of a layer use the same projections
schedule = "bell"
ffn_shift = "wide"
rank_w = 16
rank_a = 16
rank_v = 16
rank_g = 32
dim_ffn = 600
muon_lr = 0.028
eval_iters = 40
