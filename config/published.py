"""The learning rates of the published experiments:

    STRUCT_TASK=1 DW_JRT=1 DW_JRT_SCALE=20 python train.py config/published.py
"""
muon_lr = 0.02
adam_lr = 0.0026
ln_lr = 0.009
wte_lr = 0.3
head_lr = 0.002
lambda_lr = 0.02
warmdown_iters = 200
dw_jrt_inject = "leak"
dw_jrt_alpha_init = 0.0
