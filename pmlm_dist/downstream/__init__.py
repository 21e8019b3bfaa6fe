"""Fine-tuning and evaluation: the pre-trained network put to use."""
