r"""GPT-2 124M from scratch, at about half a million tokens per update (GPT-3 paper, table 2.1).

Data: FineWeb-Edu's sample of 10 billion tokens, in .parquet files; the ids take 20 GB. (This
download has not been tried.)

    pip install huggingface_hub pyarrow tqdm
    hf download HuggingFaceFW/fineweb-edu --repo-type dataset --local-dir fineweb-edu \
        --include "sample/10BT/*"
    python prepare.py fineweb-edu/sample/10BT --dataset corpus --val_fraction 0.005
    python train.py config/gpt2.py

or your own text, many gigabytes of it for a useful model,

    python prepare.py "dumps/*.jsonl.gz" --dataset corpus

or nanoGPT's data: train.bin and val.bin in data/<name>/ are read as they are (--dataset
openwebtext).

Time: 10 billion tokens take 6 x 124e6 x 10e9 = 7.4e18 floating-point operations, and a little more
for attention. At 40 % of its peak of 989e12 per second, one H100 needs about six hours; eight
(torchrun --nproc_per_node=8) 45 minutes; a laptop at 0.3e12 a year. These are estimates.

Several machines share one data/ and one out/ folder. Run this on both; node1 is the first machine:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node1:29500 \
        --rdzv_id=run1 train.py config/gpt2.py

(--rdzv_id: any word that no earlier run had, the same on both.) With Slurm, which sends SIGTERM two
minutes before the time is up:

    #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --signal=TERM@120
    export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
    srun torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=$MASTER:29500 \
        --rdzv_id=$SLURM_JOB_ID train.py config/gpt2.py

- SIGTERM or Ctrl-C saves once and ends all processes after the same update. torchrun kills them
  after 30 seconds; --shutdown-timeout 300 gives a large model more time.
- --max_restarts=3 restarts all processes when one dies. On several machines this needs
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment. A job that the scheduler starts again is
  a new run unless it says --init_from resume.
- If processes have different data or settings, or cannot connect, all end. One line says why,
  above the traceback and the report that torchrun prints. GLOO_SOCKET_IFNAME and
  NCCL_SOCKET_IFNAME name the network interface if a machine has several.
- A slow network: more sequences per update, so that gradients are averaged less often; ddp rather
  than fsdp; NCCL_DEBUG=INFO shows whether InfiniBand is used.
- Between micro batches fsdp keeps a whole gradient in each process: if memory is short, set
  --micro_batch_size to batch_size / processes.
- A checkpoint is one file of 12 bytes per parameter, collected by process 0 and read by each
  process at the start: good up to some 2 billion parameters (24 GB).

Several machines, and nccl on more than one GPU, have not been tried.
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
