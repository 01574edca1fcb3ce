"""Clipped gradients and no self-conditioning: python train.py config/gaussian.py config/gaussian_clip.py"""
objective = "gaussian"
grad_clip = 1.0
self_cond = False
