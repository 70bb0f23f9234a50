"""OpenAI's GPT-2, adapted to your own text.

    pip install transformers
    python prepare.py my.txt --dataset finetune
    python train.py config/finetune.py
    python sample.py --ckpt out/best.ckpt --start "A line of yours"

The weights come from Hugging Face's hub. Without a network, use --init_from FOLDER, a copy of the
model (config.json and model.safetensors). gpt2-medium, -large and -xl have 355M, 774M and 1,558M
parameters; training takes 16 bytes per parameter, and more for longer contexts.
"""

dataset = "finetune"
init_from = "gpt2"
context_length = 256  # of GPT-2's 1,024 positions; fewer take less memory and time
dropout = 0.1

batch_size = 8  # x 256 = 2,048 tokens per update
micro_batch_size = 4
max_iters = 200
# A tenth of the rate for training from scratch, so that the model keeps what it has learnt.
learning_rate = 5e-5
warmup_iters = 20
min_lr = 5e-6

log_interval = 5
eval_interval = 20
save_best = True  # the model soon overfits a small text; best.ckpt keeps the best weights
sample_prompt = "The"
