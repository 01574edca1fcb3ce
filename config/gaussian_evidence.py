"""The network learns what context adds to what x_t tells of its token, at the levels where most is learned:

    DATA_PATH=input.txt python train.py config/gaussian.py config/gaussian_evidence.py
"""
objective = "gaussian"
diffusion_mode = "tokens"
token_evidence = True
beta_schedule = "gumbel"
noise_shift = 5.0
schedule = "bell"
noise_spread = 64.0
self_cond = False
drop_given = 1.0
direction = "alternate"
ffn_shift = "wide"
ema = 0.0
