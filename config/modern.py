"""A modern recipe for learning more from every token. A draft: see "not yet shown" below.

python prepare.py my.txt --tokenizer bytes
python train.py config/modern.py --dataset my --n_layer 4 --n_head 4 --n_embd 128

Chosen on the standard library's sources at 1M parameters alone (bytes, 12 x 64 tokens an update,
250 updates, one or two seeds). Not yet shown: a run against the baseline at equal loss, the worth
of each field (`tests/learning.py`, `tests/learning.py --ablation`), and any larger size.
"""

dataset = "stdlib"

bias = False
tie_weights = False
rotary = True
rms_norm = True  # the embeddings are normalised too, before the first block
qk_norm = True

# Validation loss with these rates 1.785; with half of learning_rate 1.844, twice it 1.831; with
# 4 x embedding_learning_rate 1.789; with 0.4 x head_learning_rate 1.809. Muon's rate is meant to
# hold at any width, the head's is divided by n_embd / 128.
optimizer = "muon"
muon_interval = 4
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
