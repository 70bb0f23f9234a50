"""A small model on the titles of pull requests: 80 channels, 500 updates at a constant rate.

Needs a CSV (or any other text) of titles, a few hundred kilobytes; it is read as plain text:

    python prepare.py pr_titles.csv --tokenizer cl100k_base --dataset pr_titles
    python train.py config/pr_titles.py
    python sample.py --start "Fix"
"""

dataset = "pr_titles"

context_length = 128
n_layer = 6
n_head = 4
n_embd = 80
dropout = 0.1

batch_size = 2
max_iters = 500
learning_rate = 1e-3
lr_schedule = "constant"
warmup_iters = 0

eval_interval = 50
eval_iters = 10
sample_prompt = "Fix"
