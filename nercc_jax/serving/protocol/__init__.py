"""The Open Inference Protocol: models' tensors, messages, and errors, apart from any transport."""
