# Environment of a training process. Sourced by launch/pretrain_zeda.sh; what you have set yourself stays.
# HF_HUB_OFFLINE and friends are yours: nothing here downloads or forbids to download.

_zeda_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# A checkout works without being installed, whatever the current directory is.
export PYTHONPATH="$_zeda_root${PYTHONPATH:+:$PYTHONPATH}"

# One queue per GPU: kernels start in the order Megatron issued them, which its overlap of tensor-parallel
# communication and computation relies on.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Processes of one machine do not fight for cores, and sums come out the same on every machine. For one process
# on a large CPU set it to the number of cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A broken link shows as a message instead of a silent wait.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Yours, if the nodes have several networks: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (the interface of the
# rendezvous and of gloo; `lo` when all processes are on one machine), NCCL_IB_HCA (the InfiniBand adapters of the data).
# How long a collective may take before the run ends is no variable but --distributed-timeout-minutes.

# Dropless MoE allocates other sizes in every step: segments that grow keep the memory from fragmenting.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"

# Tokenizers' threads do not survive the fork with which Megatron writes checkpoints.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# The Python half of launch/pretrain_zeda.sh sees that this file was read.
export ZEDA_ENV=1

unset _zeda_root
