"""What a base model is: its architecture, its checkpoint, its tokenizer."""
