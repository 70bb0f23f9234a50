"""A small model for trying things out: a minute or two on a laptop.

python prepare.py --tokenizer bytes --dataset tiny
python train.py config/tiny.py
python sample.py --start "The "
"""

dataset = "tiny"

context_length = 128
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.1

batch_size = 16
max_iters = 600
learning_rate = 2e-3
warmup_iters = 50
min_lr = 1e-4

log_interval = 50
eval_interval = 200
