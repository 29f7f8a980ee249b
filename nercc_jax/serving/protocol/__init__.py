"""The Open Inference Protocol: tensors, messages and errors, independent of transports."""
