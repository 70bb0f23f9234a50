"""A Japanese novel, "I Am a Cat" by Natsume Soseki, with a vocabulary of its own.

    pip install tokenizers
    python prepare.py neko --tokenizer bpe:4096
    python train.py config/neko.py
    python sample.py --start "吾輩は"

A token of this vocabulary is about one and a half characters. GPT-2's vocabulary needs more than a
token for each character, and its 50,257 embeddings would be most of a model of this size. 500
updates reach 4.77 nats per token, 1.616 bits per byte (seed 1337, one run), in 12 minutes on two
cores with AVX2, or about four with bfloat16 (measured over 25 updates). It then writes:

    吾輩はちょっと滑稽でも捕えて見ると、主人の寺と、主人のごとく主人と、こんな事な夢にもやらん。

The settings are those of config/modern.py, not tuned for this text.
"""

dataset = "neko"

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

n_layer = 6
n_head = 4
n_embd = 256
context_length = 128
dropout = 0.1
batch_size = 16
max_iters = 500

log_interval = 50
eval_interval = 100
sample_prompt = "吾輩は"
