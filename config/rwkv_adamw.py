"""RWKV-LM's optimizer rules instead of Muon: STRUCT_TASK=1 DW_JRT=1 python train.py config/rwkv_adamw.py"""
optimizer = "adamw"
learning_rate = 3e-3
weight_decay = 0.001
warmup_iters = 10
dw_jrt_inject = "gate"
