"""Tiny Shakespeare, with the modern recipe: a published number on a laptop.

    python prepare.py shakespeare --tokenizer bytes
    python train.py config/shakespeare.py
    python sample.py --start "ROMEO:"

nanoGPT publishes two validation losses for this text: 1.88, of 4 layers and 128 channels after
2,000 updates of 12 x 64 characters, about three minutes on a CPU; and 1.4697, of 10.7M parameters
after 82M tokens, three minutes on an A100.
"""

dataset = "shakespeare"

# The recipe of config/modern.py.
bias = False
tie_weights = False
rotary = True
rms_norm = True
qk_norm = True
optimizer = "muon"
learning_rate = 0.02
embedding_learning_rate = 0.005
head_learning_rate = 0.005
weight_decay = 0.1
beta1 = 0.8
beta2 = 0.95
lr_schedule = "wsd"
warmup_iters = 0
cooldown_fraction = 0.5
min_lr = 0.0

# 4.85M parameters see 8.2M tokens: 8 epochs, so that regularization decides.
n_layer = 6
n_head = 4
n_embd = 256
context_length = 256
dropout = 0.1
batch_size = 16
max_iters = 2000

log_interval = 100
eval_interval = 500
eval_iters = 28  # the whole validation split: 436 windows
sample_prompt = "ROMEO:"
