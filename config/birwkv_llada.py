"""BiRWKV-LLaDA's way: BiWKV with time-conditioned decay and BiShift:

    DATA_PATH=input.txt python train.py config/birwkv_llada.py
"""
objective = "gaussian"
diffusion_mode = "mixed"
prediction_type = "x0"
beta_schedule = "cosine"
diffusion_steps = 1000
mixer = "biwkv"
norm = "rms"
time_cond = "adaln_zero"
time_dim = 128
tie_embeddings = True
ffn_shift = "both"
drop_given = 0.5
ema = 0.99
grad_clip = 1.0
device_bsz = 32
tokenizer = "char"
seq_len = 128
batch_size = 64
max_iters = 1500
n_layer = 4
n_embd = 128
head_size = 32
