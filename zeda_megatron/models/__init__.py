"""One file per architecture: HF config to Megatron config, and the weight map."""
