"""The squared error alone, no cross-entropy: python train.py config/gaussian.py config/gaussian_mse.py"""
objective = "gaussian"
diffusion_mode = "diffusion"
