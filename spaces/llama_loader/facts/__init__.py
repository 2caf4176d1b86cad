"""What is known of GPUs, drivers and CUDA libraries: facts, and nothing done about them."""
