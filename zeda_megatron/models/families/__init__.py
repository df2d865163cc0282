"""One file for each architecture: its config and its weights, Hugging Face's and Megatron's."""
