"""Random models of Hugging Face and of megatron-core, which runs in a process of its own."""
