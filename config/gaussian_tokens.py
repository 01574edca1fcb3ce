"""Cross-entropy alone, the most stable form: python train.py config/gaussian.py config/gaussian_tokens.py"""
objective = "gaussian"
diffusion_mode = "tokens"
