"""The base model: its architecture, its checkpoint and its tokenizer."""
