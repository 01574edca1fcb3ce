"""Low noise first, then wider: python train.py config/gaussian.py config/gaussian_curriculum.py"""
objective = "gaussian"
noise_levels = (0.4, 0.7, 1.0)
