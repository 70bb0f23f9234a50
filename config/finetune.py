"""GPT-2 as OpenAI trained it, adapted to a text of your own.

    pip install safetensors huggingface_hub
    python prepare.py my.txt --dataset finetune
    python train.py config/finetune.py
    python sample.py --ckpt out/best.ckpt --start "A line of yours"

The weights come from Hugging Face's hub. Without a network, say --init_from FOLDER, a copy of the
model there (config.json and model.safetensors). gpt2-medium, -large and -xl are 355M, 774M and
1,558M parameters; training takes 16 bytes for each of them, and more for longer contexts.
"""

dataset = "finetune"
init_from = "gpt2"
context_length = 256  # of the 1,024 positions that GPT-2 knows; fewer need less memory and time
dropout = 0.1

batch_size = 8  # x 256 = 2,048 tokens per update
micro_batch_size = 4
max_iters = 200
# A tenth of what training from scratch takes: what the model knows already should stay.
learning_rate = 5e-5
warmup_iters = 20
min_lr = 5e-6

log_interval = 5
eval_interval = 20
save_best = True  # a small text is soon known by heart: best.ckpt is from before
sample_prompt = "The"
