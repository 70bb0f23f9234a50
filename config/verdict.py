"""The book's model and run on The Verdict (chapter 5, with appendix D's recipe).

python prepare.py
python train.py config/verdict.py
"""

dataset = "verdict"

# The book's GPT_CONFIG_124M: 162M parameters, since its output head is a matrix of its own.
context_length = 256
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.1
qkv_bias = False
tie_weights = False

# 18 windows of 256 tokens are an epoch, 9 updates of 2; the book trains for 10 epochs.
batch_size = 2
max_iters = 90

# Appendix D: warm-up over a fifth of the updates, then cosine.
learning_rate = 5e-4
initial_lr = 3e-5
warmup_iters = 18
min_lr = 1e-6
weight_decay = 0.1
beta2 = 0.999  # PyTorch's default, as in the book
grad_clip = 1.0

log_interval = 3
eval_interval = 9  # once an epoch
eval_iters = 20  # more than both splits have: they are seen whole
sample_prompt = "Every effort moves you"
