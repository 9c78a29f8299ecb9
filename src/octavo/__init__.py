"""Octavo: any Hugging Face causal language model in 8 bits, at the speed the memory allows."""
