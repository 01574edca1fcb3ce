"""Embeddings frozen for the first steps, then learning:

    python train.py config/gaussian.py config/gaussian_thaw.py
"""
objective = "gaussian"
freeze = "emb"
unfreeze_after_steps = 100
unfreeze_patterns = "emb"
