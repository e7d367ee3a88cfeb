"""The demo model: its conversations, tokenizer, network, training and evaluation."""
