# What the jobs of a chain need to know: copy this file, fill it in, `bash launch/slurm/submit_chain.sh YOURS.sh`.
# Plain bash, read by submit_chain.sh and by every job (so keep it on the shared file system, and do not change what a
# chain reads while it is under way). What is commented out shows its default.

# Paths, all on a file system that every node sees.
HF=/data/Qwen3-30B-A3B                    # the released model, as downloaded
WORK=/data/zeda_qwen3                     # everything is written here: start/, rollouts/, fitted/, stage1/, ..., logs/
RECIPE=examples/qwen3_30b_a3b             # stage0.yaml, stage1.yaml, stage2.yaml
PROMPTS=/data/prompts.jsonl               # lines with `prompt`
# ROLLOUTS=()                             # released answers: files that take the place of stage 0
# HELDOUT=                                # conversations to evaluate on; empty: no evaluation

# The model.
# CONVERT_FLAGS=()                        # of zeda convert hf-to-megatron. (--num-zero-experts 64): the paper's shared
#                                         # zero experts in place of fitted ones, and no fit
FIT_FLAGS=(--bf16 --expert-model-parallel-size 8)  # of zeda fit, on one node
# SEED=1234
# STAGE1=1                                # 0: export what was fitted
# STAGE2=1                                # 0: export what stage 1 made

# Machines. A task is one process: one per GPU.
NODES=2                                   # of stages 1 and 2 and of the evaluation
GPUS_PER_NODE=8                           # 0: CPUs only
# TASKS_PER_NODE=8                        # default: GPUS_PER_NODE
# CPUS_PER_TASK=                          # default: what the partition gives
# SHARDS=1                                # jobs that share the prompts of stage 0; each takes STAGE0_NODES nodes
# STAGE0_NODES=1
# Stage 0 from servers: the command of one, which every node of the job runs; the prompts are asked of all of them.
# SERVER=(vllm serve "$HF" --port 8000 --tensor-parallel-size 8 --max-model-len 40960 --generation-config vllm)
# SERVER_PORT=8000 SERVER_START_SECONDS=3600
# SBATCH_FLAGS=()                         # of every sbatch: (--partition=gpu --account=me --exclusive --mem=0)

# More flags of zeda train. Two nodes with 80 GB a GPU take two pipeline stages, see the recipe's README.
STAGE0_FLAGS=()
STAGE1_FLAGS=(--pipeline-model-parallel-size 2)
STAGE2_FLAGS=(--pipeline-model-parallel-size 2)
PLAN=(--data-parallel-size 2)             # of zeda plan steps, whose two numbers go to stage 1; empty: the recipe's
EVALUATE_FLAGS=(--eval-rows 64)           # after stage 1's: the evaluation runs in its layout
EXPORT_FLAGS=(--dtype bf16)               # of zeda convert megatron-to-hf

# Time limits. A training job that meets its limit saves, goes back into the queue and goes on from there.
# TIME_CONVERT=04:00:00 TIME_STAGE0=24:00:00 TIME_FIT=04:00:00 TIME_STAGE1=24:00:00 TIME_STAGE2=24:00:00
# TIME_EXPORT=04:00:00 TIME_EVALUATE=04:00:00
# SAVE_SECONDS=600                        # before the limit comes the signal to save; a save must take less
# HANG_MINUTES=60                         # a stage that writes no step for so long is ended and started again
# MAX_RESTARTS=50                         # of one job

# Software: a Python with this package's requirements, on the nodes or in a container.
# PYTHON=python
# CONTAINER=                              # IMAGE.sif: apptainer; else (IMAGE.sqsh, registry#name:tag): pyxis
# CONTAINER_MOUNTS=()                     # more folders to mount, besides the checkout, WORK, HF and the data
# module load cuda                        # whatever your nodes need can be said here
