r"""GPT-2 124M from scratch, at about half a million tokens per update (GPT-3 paper, table 2.1).

Data: FineWeb-Edu's sample of 10 billion tokens, in .parquet files; 2 bytes each, they take 20 GB.
(The download has not been tried.)

    pip install huggingface_hub pyarrow tqdm
    hf download HuggingFaceFW/fineweb-edu --repo-type dataset --local-dir fineweb-edu \
        --include "sample/10BT/*"
    python prepare.py fineweb-edu/sample/10BT --dataset corpus --val_fraction 0.005
    python train.py config/gpt2.py

or text of your own, many gigabytes of it for a model worth having

    python prepare.py "dumps/*.jsonl.gz" --dataset corpus

or data of nanoGPT's, whose train.bin and val.bin in data/<name>/ are read as they are
(--dataset openwebtext).

Time: 10 billion tokens are 6 x 124e6 x 10e9 = 7.4e18 floating-point operations, and a little more
for attention. At 40 % of its 989e12 per second, one H100 needs about six hours; eight (torchrun
--nproc_per_node=8) 45 minutes; a laptop at 0.3e12 a year. These are sums, not measurements.
"""

dataset = "corpus"

# The model is GPTConfig's default: 12 layers, 12 heads, 768 channels, context 1,024.

batch_size = 480  # x 1,024 = 491,520 tokens per update
micro_batch_size = 16  # fits a GPU of 24 GB; the result is the same with another
max_iters = 20000  # 10 billion tokens
learning_rate = 6e-4
warmup_iters = 700
min_lr = 6e-5
weight_decay = 0.1
beta2 = 0.95

log_interval = 10
eval_interval = 250
eval_iters = 4  # of 480 sequences: 2 million tokens of each split
checkpoint_interval = 250
sample_prompt = "Once upon a time"
