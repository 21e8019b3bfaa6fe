"""Fine-tuning and evaluation of the pre-trained model on tasks."""
